"""Each test starts without compiled graphs of another; 2 cores, so torch threads do not fight test workers."""

import gc
import os
import sys
import weakref

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported lives to the end; collections between tests need not look at those half million objects."""
    gc.collect()
    gc.freeze()


_KEPT: "weakref.WeakSet[object]" = weakref.WeakSet()
"""Compiled graphs that something holds for good: a module's fixture, a program that was executed as a module."""


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    backends = sys.modules.get("accelpass.backends")
    if backends is not None and not _KEPT.issuperset(backends.compiled_graphs()):
        gc.collect()  # compiled graphs of earlier tests are in reference cycles
        _KEPT.update(backends.compiled_graphs())
        gc.freeze()  # what is left stays: with a heap of a million objects a collection takes seconds
    yield
    torch._dynamo.reset()
