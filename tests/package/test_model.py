"""A packaged module: other sizes than the example's, by name and by place, and calls that do not fit."""

from __future__ import annotations

import pytest
import torch

import accelpass
from accelpass import PackageError
from tests.package.conftest import Packaged
from tests.small_models import relative_error


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_other_batches_than_the_examples(mlp: Packaged, batch: int) -> None:
    """Eager, the semantic op's definition multiplies the very same packed weights."""
    opened = accelpass.open(mlp.path)
    x = torch.randn(batch, 64)
    with torch.no_grad():
        want = accelpass.compile(mlp.model, ["int8_weights"], lowering="eager")(x)
    assert relative_error(opened(x), want) < 0.01  # many rows are multiplied in bfloat16 where the CPU has it
    assert torch.equal(opened(x=x), opened(x))


def test_what_the_report_and_the_manifest_say(mlp: Packaged) -> None:
    report, manifest = mlp.report, accelpass.open(mlp.path).manifest
    assert report.difference is not None and report.difference < 0.01
    assert report.took()["int8_weights"] == len(manifest.report["model"][0]["took"]) > 0
    assert report.weights_after < report.weights_before / 2
    assert manifest.passes[0]["name"] == "int8_weights" and manifest.torch == torch.__version__
    (x,) = manifest.graphs["model"].inputs
    assert (x.shape[0].name, x.shape[0].least) == ("batch", 1)
    assert report.bytes == mlp.path.stat().st_size and str(mlp.path) in str(report)
    assert set(report.to_dict()["seconds"]) == {"model"}


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, r"takes the tensors x \(missing: x\)"),
        ((), {"y": torch.ones(2, 2)}, r"unknown: y"),
        ((1,), {}, "x is a int; the package takes a tensor"),
        ((torch.ones(2, 3),), {}, r"x is \(2, 3\); the package takes \(batch, "),
        ((torch.ones(2),), {}, "x has 1 dimensions"),
        ((torch.ones(2, 3, dtype=torch.float64),), {}, "x is float64 on cpu; the package takes float32"),
    ],
)
def test_calls_that_do_not_fit(mlp: Packaged, args: tuple, kwargs: dict, said: str) -> None:
    with pytest.raises(PackageError, match=said):
        accelpass.open(mlp.path)(*args, **kwargs)
