"""The same pass through the other frontend: ``torch.export``, and from there to ONNX."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.ir import attention
from accelpass.ir.core.capture import from_export
from accelpass.ir.core.verify import signature, verify
from accelpass.ir.kv import lower as kv
from accelpass.ir.torch_private import tree_leaves
from accelpass.passes.core.manager import run as apply
from accelpass.passes.core.plan import Plan
from accelpass.testing.findings import Finding, failed, passed, skipped
from accelpass.testing.numbers import attempt
from accelpass.testing.subjects import Subject
from accelpass.testing.trial import Trial, difference, is_refusal, told


def check_export(trial: Trial, subject: Subject) -> Finding:
    """``torch.export``, the pass and the verifier: the graph gives what the compiled model gives; the same of ONNX, where
    accelpass can export it."""

    def body() -> Finding:
        if subject.export is None:
            return skipped("export", subject.name, "one call of it alone shows nothing")
        model = subject.build(0)
        args, kwargs = subject.export(subject.shapes[0])
        with torch.no_grad():
            want = _tensors(trial.compile(model, [trial.made()])(*args, **kwargs))
            program = from_export(torch.export.export(model, args, dict(kwargs)))
            program.artefacts = trial.tensors
            attention.insert(program)
            before = signature(program)
            (record,) = apply(program, [trial.made()])
            kv.lower(program)
            attention.lower(program)
            verify(program, before, after=trial.name)
            program.gm.recompile()
            got = _tensors(program.gm(*args, **kwargs))
            dense = _tensors(model(*args, **kwargs)) if not record.took else []
        if not record.took and difference(got, dense) <= trial.tolerance and difference(want, dense) > trial.tolerance:
            why = "; ".join(dict.fromkeys(record.skipped.values()))
            if not why:
                return failed(
                    "export", subject.name, "an exported graph is left alone without a reason", "record.skip(site, why)"
                )
            return skipped("export", subject.name, f"no site of an exported graph is taken, which stays dense: {why}")
        error = difference(got, want)
        what = f"the exported graph with {len(record.took)} sites taken, against the compiled model"
        if not error <= trial.tolerance:
            return failed(
                "export",
                subject.name,
                what,
                "what the pass asks of program.tensors: both doors have derive() and path()",
                error,
            )
        written, onnx_error = _onnx(trial, model, args, dict(kwargs), want)
        if onnx_error is not None and not onnx_error <= 10 * trial.tolerance:
            return failed(
                "export",
                subject.name,
                "ONNX Runtime against the compiled model",
                "the op's ONNX translation",
                onnx_error,
            )
        return passed("export", subject.name, f"{what}; {written}", max(error, onnx_error or 0.0))

    return attempt("export", trial, subject, body)


def _onnx(trial: Trial, model: nn.Module, args: Any, kwargs: Any, want: list[Tensor]) -> tuple[str, float | None]:
    """What came of the file, and how far ONNX Runtime's outputs are from ``want``."""
    import accelpass

    if "export_onnx" not in accelpass.__all__:
        return "this version writes no ONNX", None
    if kwargs:
        return "ONNX not tried (keyword arguments)", None
    absent = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
    if absent:
        return f"ONNX not tried (without {', '.join(absent)})", None
    export: Any = vars(accelpass).get("export_onnx") or accelpass.__getattr__("export_onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            plan = Plan.of(model, [], dict(trial.tensors)) if trial.tensors else None
            export(model, args, path, passes=[trial.made()], plan=plan)
        except Exception as error:
            if is_refusal(error):
                return f"ONNX refused: {told(error)[:160]}", None
            raise
        session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tree_leaves(args), strict=True)}
        made = [torch.from_numpy(a) for a in session.run(None, given)]
    return "the same in ONNX Runtime", difference(made, want)


def _tensors(made: Any) -> list[Tensor]:
    if hasattr(made, "items"):
        made = [v for _, v in made.items()]
    return [t for t in tree_leaves(made) if isinstance(t, Tensor)]
