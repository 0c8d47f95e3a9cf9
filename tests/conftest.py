"""Each test starts without compiled graphs of another; 2 cores, so torch threads do not fight test workers."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported lives to the end; collections between tests need not look at those half million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    backends = sys.modules.get("accelpass.backends")
    if backends is not None and backends.compiled_graphs():
        gc.collect()  # compiled graphs of earlier tests are in reference cycles
    yield
    torch._dynamo.reset()
