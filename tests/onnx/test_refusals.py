"""What cannot be exported is named, with what to do; the model stays as it was, and nothing half-written is left."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import accelpass
from accelpass import ExportError
from accelpass.backends.onnx import errors, files
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, call, shape
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Pass, Record
from tests.passes.test_kv_methods import llama
from tests.small_models import tiny_lm
from tests.sweep import sweep

IDS = torch.arange(10).view(2, 5)


@contextmanager
def untouched(model: nn.Module, folder: Path) -> Iterator[None]:
    """The model and the folder are afterwards as before."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kept, there = dict(model.__dict__), sorted(folder.iterdir())
    yield
    now = model.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in now)
    assert kept.keys() == model.__dict__.keys() and not model.training
    assert sorted(folder.iterdir()) == there


def refused(
    folder: Path, said: str, *passes: Any, model: nn.Module | None = None, error: Any = ExportError, **options: Any
) -> None:
    model = tiny_lm() if model is None else model
    args = options.pop("args", (IDS,))
    with untouched(model, folder), pytest.raises(error, match=said):
        accelpass.export_onnx(model, args, options.pop("path", folder / "m.onnx"), list(passes), **options)


@pytest.mark.parametrize("name", ["h2o", "mikv", "kv_quant", "kv_window", "cskv", "tidaldecode"])
def test_a_cache_pass_without_a_cache(tmp_path: Path, name: str) -> None:
    refused(tmp_path, f"{name} changes how a key/value cache is kept.*past_key_values", name)


@pytest.mark.parametrize("name", ["ditfastattn", "delta_cache"])
def test_passes_across_denoising_steps_of_a_model_without_any(tmp_path: Path, name: str) -> None:
    refused(tmp_path, f"{name} has nothing to do.*export without it", name)


def test_a_pass_that_reads_back_at_each_step(tmp_path: Path) -> None:
    model = llama(layers=2)
    cache = {"past_key_values": accelpass.KVCache(model, capacity=8)}
    refused(
        tmp_path, "lazyllm reads back at each step.*without past_key_values", "lazyllm", model=model,
        args=(IDS[:1],), kwargs=cache,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 17}, "opset=17 is not supported; use 18 to 23"),
        ({"opset": "23"}, "opset='23' is not supported"),
        ({"activations": "int4"}, "activations='int4' is not known; use 'float32' or 'int8'"),
        ({"path": "m.bin"}, "m.bin does not end in .onnx"),
        ({"path": "/nowhere/m.onnx"}, "no folder /nowhere; make it first"),
        ({"args": (IDS, IDS)}, "do not fit TinyLm.forward: too many positional"),
        ({"args": (None,)}, "torch.export cannot trace TinyLm"),
        ({"dynamic_shapes": {"idz": {0: "batch"}}}, r"names 'idz' \(did you mean 'ids'\?\)"),
        ({"dynamic_shapes": {"ids": {2: "batch"}}}, "ids has 2 dimensions, none is numbered 2"),
    ],
)
def test_arguments(tmp_path: Path, options: dict, said: str) -> None:
    refused(tmp_path, said, **options)


def test_an_opset_too_old_for_packed_weights(tmp_path: Path) -> None:
    said, linear = "packed weights need opset 21 or more.*contrib=True", nn.Linear(64, 64).eval()
    refused(tmp_path, said, "int8_weights", opset=18, model=linear, args=(torch.ones(1, 64),))


def test_a_model_in_training_mode(tmp_path: Path) -> None:
    model = tiny_lm().train()
    with pytest.raises(ExportError, match=r"TinyLm is in training mode; type: model.eval\(\)"):
        accelpass.export_onnx(model, (IDS,), tmp_path / "m.onnx")
    assert model.training and not list(tmp_path.iterdir())


def test_a_dimension_that_the_model_fixes(tmp_path: Path) -> None:
    refused(
        tmp_path, r"the model fixes a dimension .*\(ids\[0\]\)", args=(IDS[:1],), dynamic_shapes={"ids": {0: "batch"}}
    )


class Counter(nn.Module):
    """Writes to a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * self.seen


def test_a_model_that_writes_to_itself(tmp_path: Path) -> None:
    refused(tmp_path, "the model writes to seen, which a file cannot", model=Counter().eval(), args=(torch.ones(2),))


def test_a_cache_that_is_not_empty(tmp_path: Path) -> None:
    model = llama(layers=1)
    cache = accelpass.KVCache(model, capacity=8)
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
    refused(
        tmp_path,
        "the KVCache holds 5 tokens; give an empty one",
        model=model,
        args=(IDS[:1],),
        kwargs={"past_key_values": cache},
    )


def test_a_decoding_step_with_an_argument_that_is_not_known(tmp_path: Path) -> None:
    model = llama(layers=1)
    kwargs = {"past_key_values": accelpass.KVCache(model, capacity=8), "attention_mask": torch.ones(1, 5)}
    refused(
        tmp_path,
        "what attention_mask is in a call for one token is not known.*decode=",
        model=model,
        args=(IDS[:1],),
        kwargs=kwargs,
    )


@dataclass(frozen=True)
class Foreign(Pass):
    """A third party's pass that does with each linear what a test says."""

    does: Callable[[Program, Any], Any] = lambda program, site: None

    name: ClassVar[str] = "foreign"
    phase: ClassVar[str] = "weights"
    summary: ClassVar[str] = ""

    def apply(self, program: Program, record: Record) -> None:
        for site in program.analysis(linears):
            with program.graph.inserting_before(site.node):
                made = self.does(program, site)
            if made is not None:
                site.node.replace_all_uses_with(made)
                program.graph.erase_node(site.node)
                record.take(site.path, Done("done"))


def test_a_pass_that_raises(tmp_path: Path) -> None:
    def broken(program: Program, site: Any) -> None:
        raise KeyError("oops")

    refused(tmp_path, "the pass 'foreign' failed: KeyError: 'oops'", Foreign(broken), error=accelpass.PassError)


def test_a_pass_that_fixes_a_dynamic_dimension(tmp_path: Path) -> None:
    def fixing(program: Program, site: Any) -> None:
        assert shape(site.x)[0] == 2

    said = "the pass 'foreign' fixes dimension 0 of ids at 2.*leave the pass out"
    refused(tmp_path, said, Foreign(fixing), dynamic_shapes={"ids": {0: "batch"}})


@torch.library.custom_op("accelpass_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _doubling(program: Program, site: Any) -> Any:
    half = call(program.graph, site.node, aten.mul.Scalar, site.x, 0.5)
    x = call(program.graph, site.node, doubled._opoverload, half)
    return call(program.graph, site.node, aten.linear.default, x, *site.node.args[1:])


def test_an_operator_without_a_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"accelpass_tests.doubled.default \(from the pass 'foreign'\) has no translation.*register_translation"
    refused(tmp_path, said, Foreign(_doubling))
    from onnxscript import opset18 as op

    from accelpass.backends.onnx import register_translation
    from accelpass.backends.onnx.translation import translations

    monkeypatch.setattr(translations, "_REGISTERED", {})
    register_translation(doubled._opoverload, lambda x: op.Add(x, x))
    with pytest.raises(ValueError, match="has a translation already"):
        register_translation(doubled._opoverload, lambda x: op.Add(x, x))
    report = accelpass.export_onnx(tiny_lm(), (IDS,), tmp_path / "m.onnx", [Foreign(_doubling)])
    # Two linears read one input, and the optimiser doubles it once: 4 sums of the model, and 5.
    assert report.took() == {"foreign": 7} and report.files[0].operators["Add"] == 9


def test_a_weight_that_would_grow_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that writes int8 as ``Cast`` and ``Mul`` of constants: the optimiser makes floats of it, and the export says so."""
    from accelpass.backends.onnx.translation import translate

    def cast(program: Program, site: Any) -> Any:
        recipe = Recipe(("foreign",), lambda w: ((w * 64).round().to(torch.int8),))
        (q,) = program.tensors.derive([site.weight], recipe, ["q"])
        wide = call(program.graph, site.node, aten.to.dtype, q, torch.float32)
        scaled = call(program.graph, site.node, aten.mul.Scalar, wide, 1 / 64)
        return call(program.graph, site.node, aten.linear.default, site.x, scaled, *site.node.args[2:])

    model = nn.Sequential(nn.Linear(200, 200)).eval()
    x = torch.randn(2, 200)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", [Foreign(cast)])
    assert report.weights_after < 50_000  # as the exporter is used, nothing of this size is computed in advance
    report.path.unlink()
    monkeypatch.setattr(translate, "_FOLDED", 1 << 20)
    refused(
        tmp_path,
        "the file would hold 0.2 MB of weights, and the pass 'foreign' left 0.0 MB",
        Foreign(cast),
        model=model,
        args=(x,),
    )


@pytest.mark.parametrize("external", sweep(True, False))
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    (tmp_path / "m.onnx").write_text("an older file")
    real = ir.save

    def full(model: Any, path: Path, **options: Any) -> None:
        real(model, path, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.ir, "save", full)
    linear = nn.Linear(64, 64).eval()
    refused(
        tmp_path,
        "No space left on device.*free some space",
        model=linear,
        args=(torch.ones(1, 64),),
        external_data=external,
    )
    assert (tmp_path / "m.onnx").read_text() == "an older file"


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name != "onnx" else builtins)
    refused(tmp_path, r"needs onnxscript, onnxruntime; type: pip install 'accelpass\[onnx\]'")
