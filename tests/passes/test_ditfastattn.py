import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelpass.models_zoo import tiny_diffusers
from tests.passes.step_truth import denoise, fast_attention

TIMES = [9, 7, 5, 4, 2, 1]
PATHS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
LETTERS = st.tuples(*[st.text("FAWXC", min_size=5, max_size=5).map(lambda s: "F" + s)] * 2)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def model_of(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    return model.eval(), call


def fast_of(model: torch.nn.Module, lowering: str = "eager", **options: Any) -> Any:
    options = {"name": "ditfastattn", "timesteps": TIMES, "window": 3, **options}
    return torch.compile(model, backend="accelpass", options={"passes": [options], "lowering": lowering})


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(letters=LETTERS, name=st.sampled_from(["dit", "pixart"]), window=st.integers(0, 20), first=st.booleans())
def test_follows_the_oracle(letters: tuple[str, str], name: str, window: int, first: bool) -> None:
    torch._dynamo.reset()
    model, call = model_of(name)
    methods = dict(zip(PATHS, letters, strict=True))
    truth = denoise(fast_attention(copy.deepcopy(model), methods, window, first), call, TIMES)
    found = denoise(fast_of(model, methods=methods, window=window, cond_first=first), call, TIMES)
    for step, (a, b) in enumerate(zip(truth, found, strict=True)):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4, msg=lambda m, step=step: f"step {step}: {m}")
