"""How far a file may be from torch where a pass rounds inputs of products: as far as rounding goes on the example, and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import accelpass
from accelpass.backends.onnx import runtime
from accelpass.backends.onnx.translation import activations
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.rows import IntRows
from accelpass.ir.linear.spec import WeightFormat
from tests.small_models import tiny_lm
from tests.sweep import sweep

IDS = torch.arange(6)[None]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """What rounding was found to do, and what was allowed."""
    seen, allowed = list[float](), list[float]()
    effect, difference = activations.effect_of_rounding, runtime.difference
    monkeypatch.setattr(activations, "effect_of_rounding", lambda made: seen.append(effect(made)) or seen[-1])
    monkeypatch.setattr(runtime, "difference", lambda *a: allowed.append(a[-1]) or difference(*a))
    return seen, allowed


def weights_alone(form: WeightFormat) -> nn.Module:
    """The model with its weights rounded and inputs as they are."""
    model = tiny_lm()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = form.unpack(form.pack(module.weight.data), torch.float32)
    return model


def export(tmp_path: Path, given: dict[str, Any], plan: Any = None) -> Any:
    torch._dynamo.reset()
    return accelpass.export_onnx(tiny_lm(), (IDS,), tmp_path / "m.onnx", [] if plan else [given], plan=plan)


@pytest.mark.parametrize(
    ("given", "form"),
    sweep(
        ({"name": "vidit_q", "bits": 4}, IntRows(4)),
        ({"name": "vidit_q", "activation_bits": 4}, IntRows(8)),
        ({"name": "vidit_q", "symmetric": True}, Int8()),
        ({"name": "int8_dynamic"}, Int8()),
    ),
)
def test_the_bound_is_what_rounding_does(
    tmp_path: Path, limits: tuple[list[float], list[float]], given: dict[str, Any], form: WeightFormat
) -> None:
    """Also where the weight's format has no form in ONNX and is unpacked: what multiplies the codes then is an ordinary product."""
    seen, allowed = limits
    export(tmp_path, given)
    torch._dynamo.reset()
    fast = torch.compile(tiny_lm(), backend="accelpass", options={"passes": [given], "lowering": "eager"})
    with torch.no_grad():
        rounded, plain = fast(IDS).clone(), weights_alone(form)(IDS)
    far = float((rounded - plain).abs().max() / plain.abs().max())
    assert seen == [pytest.approx(far, rel=0.05)] and far > runtime.TOLERANCE
    assert allowed == seen


def test_ranges_of_a_plan_are_measured_too(tmp_path: Path, limits: tuple[list[float], list[float]]) -> None:
    """Pairs of operators of the standard; a number beyond the range is clipped in both."""
    seen, allowed = limits
    plan = accelpass.calibrate(tiny_lm(), [{"ids": IDS}], ["int8_static"], progress=False)
    export(tmp_path, {}, plan)
    assert allowed == seen and runtime.TOLERANCE < seen[0] < 0.1


def test_weights_alone_are_held_to_the_ordinary_bound(tmp_path: Path, limits: tuple[list[float], list[float]]) -> None:
    seen, allowed = limits
    export(tmp_path, {"name": "int4_weights", "group_size": 32})
    assert not seen and allowed == [runtime.TOLERANCE]


def test_a_file_that_is_further_off_is_refused(
    tmp_path: Path, limits: tuple[list[float], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runtime.run

    def off(loaded: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [y + 2 * limits[0][0] * y.abs().max() for y in run(loaded, inputs)]

    monkeypatch.setattr(runtime, "run", off)
    with pytest.raises(accelpass.ExportError, match=r"differs by .* is\s+allowed"):
        export(tmp_path, {"name": "vidit_q"})


def test_rounding_that_no_operator_is_known_to_do_allows_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    codes = graph.call_function(torch.ops.aten.floor.default, (x,))
    codes.meta[activations.ROUNDED] = True
    graph.output((codes,))
    made = activations._Unrounded(fx.GraphModule({}, graph)).run(torch.tensor([1.5]))
    assert made[0] == torch.tensor([1.0])
