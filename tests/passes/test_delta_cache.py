import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelpass.backends import graphs_of
from accelpass.backends.staged.stage import Stage
from accelpass.models_zoo import digits, tiny_diffusers
from tests.passes.step_truth import DeltaBlock, denoise
from tests.sweep import examples, sweep

TIMES = [9, 8, 7, 6, 5, 4, 3, 2, 1]


@settings(max_examples=examples(5), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["dit", "pixart"]),
    start=st.integers(0, 3),
    interval=st.integers(1, 4),
    predict=st.sampled_from(["delta", "taylor"]),
    both=st.booleans(),
)
def test_follows_the_oracle(name: str, start: int, interval: int, predict: str, both: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    model.eval()
    truth = copy.deepcopy(model)
    for number in (0, 1) if both else (1,):
        truth.transformer_blocks[number] = DeltaBlock(
            truth.transformer_blocks[number], start, interval, predict == "taylor"
        )
    cached = {"name": "delta_cache", "start": start, "interval": interval, "predict": predict}
    cached["include"] = ["*"] if both else ["*.1"]
    fast = torch.compile(model, backend="accelpass", options={"passes": [cached], "lowering": "eager"})
    for wanted, found in zip(denoise(truth, call, TIMES), denoise(fast, call, TIMES), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_blocks_hand_on_what_the_next_one_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches of an image come channel by channel in memory; a block that only adds to them would hand that on."""
    torch._dynamo.reset()
    monkeypatch.setitem(digits.CONFIG, "num_layers", 2)
    model = digits.transformer(trained=False)
    call = {"timestep": torch.tensor([9, 9]), "class_labels": torch.tensor([1, 1000])}
    cached = {"name": "delta_cache", "start": 0, "interval": 2}
    fast = torch.compile(model, backend="accelpass", options={"passes": [cached], "lowering": "aten"})
    run = {**call, "hidden_states": torch.zeros(2, 1, 32, 32)}
    denoise(fast, run, [9.0])
    (graph,) = graphs_of(model)
    assert graph.steps is not None
    (composition,) = graph.steps.models.values()
    seen: list[tuple[object, object]] = []
    for key, piece in composition.stages.items():

        def watched(*args: torch.Tensor, piece: Stage = piece) -> tuple[torch.Tensor, ...]:
            made = piece.fn(*args)
            seen.extend((t.stride(), piece.layouts[name][1]) for name, t in zip(piece.made, made, strict=True))
            return made

        composition.stages[key] = replace(piece, fn=watched)
    del composition.linked  # is linked anew
    denoise(fast, run, [9.0, 7.0, 5.0])
    assert len(seen) > 9 and all(a == b for a, b in seen)


@pytest.mark.parametrize("name", sweep("wan", "sd3", "flux"))
def test_a_cached_block_is_gone(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    model.eval()
    cached = {"name": "delta_cache", "start": 0, "interval": 2}
    fast = torch.compile(model, backend="accelpass", options={"passes": [cached], "lowering": "eager"})
    denoise(fast, call, [900, 700, 500])
    steps = graphs_of(model)[0].report.steps
    assert steps is not None and steps.flops[0] == steps.dense
    assert steps.flops[1] < 0.75 * steps.dense


def test_the_report_is_of_the_run_that_the_schedule_is_for() -> None:
    model, call = tiny_diffusers.build("dit")
    cached = {"name": "delta_cache", "start": 1, "interval": 2, "timesteps": TIMES}
    fast = torch.compile(model.eval(), backend="accelpass", options={"passes": [cached], "lowering": "eager"})
    denoise(fast, call, TIMES)
    steps = graphs_of(model)[0].report.steps
    assert steps is not None and steps.timesteps == tuple(TIMES)
    assert [row[0] for row in steps.actions] == ["full", "full", *["reuse", "full"] * 3, "reuse"]
    assert steps.variants == 3  # in full, in full and kept, reused
