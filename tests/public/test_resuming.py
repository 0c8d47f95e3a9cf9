"""A calibration that was interrupted goes on after the last finished block, and gives what one run gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import accelpass
from accelpass.passes.quantization.gptq import GPTQ
from tests.passes.test_learnt_rounding import Stack, data


class Stopped(BaseException):
    """As Ctrl-C is."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups of weights were learnt, and after how many to stop (0: never)."""
    plain, count = GPTQ.learn, [0, 0]

    def learn(self: GPTQ, *given: Any) -> Any:
        if count[1] and count[0] == count[1]:
            raise Stopped
        count[0] += 1
        return plain(self, *given)

    monkeypatch.setattr(GPTQ, "learn", learn)
    return count


def test_it_goes_on_after_the_last_finished_block(tmp_path: Path, counted: list[int]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, passes = Stack().eval(), [{"name": "gptq", "group_size": 32}]
    whole = accelpass.calibrate(model, data(), passes, progress=False)
    groups = counted[0]
    assert groups == 2 * 2  # up and down
    counted[:] = [0, 3]  # in the middle of the second block
    with pytest.raises(Stopped):
        accelpass.calibrate(model, data(), passes, progress=False, resume=tmp_path / "begun")
    assert [f.name for f in sorted((tmp_path / "begun").glob("*.safetensors"))] == ["gptq.0.safetensors"]
    counted[:] = [0, 0]
    plan = accelpass.calibrate(model, data(), passes, progress=False, resume=tmp_path / "begun")
    assert counted[0] == groups - 2
    assert plan.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(t, whole.tensors[name]) for name, t in plan.tensors.items())


def test_a_folder_of_another_calibration_is_refused(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, batches, passes = Stack(layers=1).eval(), data(), [{"name": "gptq", "group_size": 32}]
    given: dict[str, Any] = {"progress": False, "resume": tmp_path}
    accelpass.calibrate(model, batches, passes, **given)
    with pytest.raises(accelpass.OptionError, match="begun with other data; remove it"):
        accelpass.calibrate(model, batches[:1], passes, **given)
    with pytest.raises(accelpass.OptionError, match="begun with other passes; remove it"):
        accelpass.calibrate(model, batches, [{**passes[0], "damping": 0.1}], **given)
    with torch.no_grad():
        model.layers[0].norm.weight.mul_(2)
    with pytest.raises(accelpass.OptionError, match="begun with other model"):
        accelpass.calibrate(model, batches, passes, **given)


@pytest.mark.slow
def test_the_command_goes_on(cli: Callable[..., Result], folder: Path, tmp_path: Path, counted: list[int]) -> None:
    torch._dynamo.reset()
    prose, out = tmp_path / "prose.txt", tmp_path / "packed"
    prose.write_text("the quick brown fox jumps over the lazy dog. " * 9)
    typed = ("quantize", folder, "-o", out, "--data", prose, "--samples", 2, "--tokens", 64, "--group-size", 32)
    counted[1] = 2
    with pytest.raises(Stopped):
        cli(*typed)
    assert not out.exists() and (tmp_path / "packed.partial" / "calibration.json").exists()
    counted[:] = [0, 0]
    shown = cli(*typed)
    assert shown.exit_code == 0, shown.output
    assert out.is_dir() and not (tmp_path / "packed.partial").exists()
