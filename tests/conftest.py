"""Each test starts without compiled graphs of another; 2 cores, so torch threads do not fight test workers."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
# Tracing makes objects by the hundred thousand that live on: Python's default of a collection for each 700 is a fifth of all time
# here. What a test has compiled is collected after it.
gc.set_threshold(100_000, 50, 100)
# What Dynamo logs of side effects costs it the stack of each.
if hasattr(torch._dynamo.config, "side_effect_replay_policy"):  # not in the oldest torch
    torch._dynamo.config.side_effect_replay_policy = "silent"


_newest = 0
"""The number of the newest graph that had been compiled at the last collection."""


def _settle() -> None:
    """What lives now lives to the end; collections between tests need not look at those half million objects."""
    gc.collect()
    gc.freeze()


def _collect_graphs() -> None:
    """Compiled graphs of earlier tests are in reference cycles; one that something holds is not looked for twice."""
    global _newest
    backends = sys.modules.get("accelpass.backends")
    numbers = [graph.report.number for graph in backends.compiled_graphs()] if backends is not None else []
    if numbers and numbers[-1] > _newest:
        _newest = numbers[-1]
        gc.collect()


def pytest_collection_finish():
    _settle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is not None and nextitem.path != item.path:  # fixtures of the file are gone, and its imports stay
        _settle()
    return result


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    _collect_graphs()
    yield
    torch._dynamo.reset()
