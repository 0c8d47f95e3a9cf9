"""What a file is checked by: the ONNX checker, and ONNX Runtime against the graph run by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelpass.backends.onnx.errors import ExportError

TOLERANCE = 1e-4
"""Largest difference over the largest magnitude of an output."""


def check(path: Path) -> None:
    """Raise :class:`ExportError` if a file breaks the standard, types and shapes included."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
        raise ExportError(f"{path.name} is no valid ONNX model, which is a bug of accelpass: {cause}") from cause


def session(path: Path, optimised: bool = True) -> Any:
    """An ONNX Runtime session on the CPU; not optimised, it computes what the file says and in that order.

    Raises:
        ExportError: ONNX Runtime does not load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # its errors have a common base that is not exported
        raise ExportError(f"ONNX Runtime does not load {path.name}: {' '.join(str(cause).split())[:400]}") from cause


def run(loaded: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a session, for those of ``inputs`` that it takes."""
    wanted = {i.name for i in loaded.get_inputs()}
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items() if name in wanted}
    try:
        return [torch.from_numpy(np.asarray(made)) for made in loaded.run(None, feed)]
    except Exception as cause:  # see session()
        raise ExportError(f"ONNX Runtime fails on the example inputs: {' '.join(str(cause).split())[:400]}") from cause


def difference(names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative difference of the named outputs, which come first; integers have to be equal.

    Raises:
        ExportError: an output differs by more; names it.
    """
    worst = 0.0
    for name, mine, its in zip(names, got, want, strict=False):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            raise ExportError(
                f"{name} is {tuple(mine.shape)} {mine.dtype} in ONNX Runtime, {tuple(its.shape)} {its.dtype} in torch"
            )
        if not its.numel():
            continue
        if its.is_floating_point():
            both = torch.isfinite(its)
            if not torch.equal(both, torch.isfinite(mine)):
                raise ExportError(f"{name} has other infinities or NaN in ONNX Runtime than in torch")
            scale = float(its[both].double().abs().max()) if both.any() else 0.0
            far = (
                float((mine[both].double() - its[both].double()).abs().max()) / max(scale, 1e-6) if both.any() else 0.0
            )
            if far > tolerance:
                raise ExportError(f"{name} differs by {far:.1e} of its largest value between ONNX Runtime and torch")
            worst = max(worst, far)
        elif not torch.equal(mine, its):
            share = float((mine != its).float().mean())
            raise ExportError(f"{name} holds other integers in ONNX Runtime than in torch ({share:.1%} of them)")
    return worst
