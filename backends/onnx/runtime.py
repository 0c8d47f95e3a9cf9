"""What a file is checked by: the ONNX checker, and ONNX Runtime against the graph run by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelpass.backends.export.errors import ExportError
from accelpass.ir.core.graph import value
from accelpass.ir.linear.lower import ROUNDED

TOLERANCE = 1e-4
"""Largest difference over the largest magnitude of an output, of a model that computes in float32."""
_STEPS = 8
"""The same of a shorter dtype, in steps of its rounding: sums are rounded in another order, several times on the way."""


def tolerance_of(dtype: torch.dtype) -> float:
    """How far an output may be off, over its largest value, where the model computes in ``dtype``."""
    return max(TOLERANCE, _STEPS * torch.finfo(dtype).eps)


def rounds_inputs(graph: torch.fx.Graph) -> bool:
    """Whether a pass rounds what is multiplied with a weight, of whatever format; the graph is lowered."""
    return any(ROUNDED in node.meta for node in graph.nodes)


def coarsest(graph: torch.fx.Graph) -> torch.dtype:
    """The shortest float dtype among a graph's values."""
    held = (value(node) for node in graph.nodes)
    found = {t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


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
        raise ExportError(f"ONNX Runtime does not load {path.name}: {_whole(cause)} {_remedy(path)}") from cause


def _whole(cause: Exception) -> str:
    """A message on one line, not shortened: what is missing may stand at its end."""
    return " ".join(str(cause).split()).rstrip(".") + "."


def _remedy(path: Path) -> str:
    """What to type where ONNX Runtime has no kernel for what a file holds."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    opset = next(i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
    wide = onnx.TensorProto.BFLOAT16
    if any(v.type.tensor_type.elem_type == wide for v in [*model.graph.input, *model.graph.output]) or any(
        t.data_type == wide for t in model.graph.initializer
    ):
        return (
            "Few of its kernels on the CPU know bfloat16: export model.float() or model.half(), or type verify=False."
        )
    other = 21 if opset > 21 else 23
    return f"Try another opset than {opset} (opset={other}, say), or verify=False if the file is for another runtime."


def run(loaded: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a session, for those of ``inputs`` that it takes."""
    wanted = {i.name for i in loaded.get_inputs()}
    odd = [name for name, tensor in inputs.items() if name in wanted and tensor.dtype == torch.bfloat16]
    if odd:
        raise ExportError(
            f"ONNX Runtime is given numpy arrays, which have no bfloat16 ({', '.join(odd)}); export model.float() or model.half(), or "
            "type verify=False"
        )
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items() if name in wanted}
    try:
        return [torch.from_numpy(np.asarray(made)) for made in loaded.run(None, feed)]
    except Exception as cause:  # see session()
        raise ExportError(
            f"ONNX Runtime fails on inputs like the example's: {_whole(cause)} Try another opset (opset=21, say), "
            "or verify=False if the file is for another runtime."
        ) from cause


def difference(names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative difference of the named outputs, which come first; integers have to be equal.

    Raises:
        ExportError: an output differs by more; names it.
    """
    worst = 0.0
    for name, mine, its in zip(names, got, (t.detach() for t in want), strict=False):
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
                raise ExportError(
                    f"{name} differs by {far:.1e} of its largest value between ONNX Runtime and torch, and {tolerance:.1e} is "
                    "allowed; try another opset, or verify=False and measure the answers yourself"
                )
            worst = max(worst, far)
        elif not torch.equal(mine, its):
            share = float((mine != its).float().mean())
            raise ExportError(f"{name} holds other integers in ONNX Runtime than in torch ({share:.1%} of them)")
    return worst
