"""The rewritten graph as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from accelpass.backends.onnx.errors import require_packages

if TYPE_CHECKING:
    from accelpass.backends.onnx.report import ExportReport

OPSET = 23
"""The first with an operator for attention."""


def export_onnx(
    model: torch.nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    passes: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    plan: Any = None,
    opset: int = OPSET,
    contrib: bool = False,
    activations: Literal["float32", "int8", "qdq"] = "float32",
    external_data: bool | None = None,
    verify: bool = True,
    decode: Mapping[str, Any] | None = None,
    steps: int | None = None,
    skip_sites: Mapping[str, Sequence[str]] | None = None,
    calibration: Sequence[Mapping[str, Any]] = (),
    debug: bool = False,
) -> ExportReport:
    """Write ``model`` with ``passes`` applied as an ONNX file. The model itself is not changed.

    With an empty ``accelpass.KVCache`` among the arguments two files are written, ``NAME.prompt.onnx`` and
    ``NAME.decode.onnx``, which share one file of weights, and ``NAME.json``, which says how state goes between them.

    With a pass that works across denoising steps a file is written for each way of computing a step (``NAME.0.onnx``, ...),
    again with one file of weights, and ``NAME.json``, which says which step uses which and what goes from step to step.

    Args:
        model: in eval mode.
        args, kwargs: an example call; of a decoder with a cache, its prompt.
        path: ends in ``.onnx``.
        passes: names, ``{"name": ..., option: value}`` or pass objects. Nothing runs that is not named here or in the plan.
        dynamic_shapes: as ``torch.export`` takes it, by argument name: ``{"input_ids": {0: "batch", 1: "tokens"}}``.
        plan: a plan, or the path of one.
        opset: 18 to 23; packed weights need 21 or more, the Attention operator 23.
        contrib: use ONNX Runtime's own operators (``MatMulNBits``) where they fit; other runtimes cannot read the file then.
        activations: ``int8`` lets ONNX Runtime round what is multiplied with packed weights, by blocks, which is several times
            faster and other numbers: the report says how far off. ``qdq`` rounds them in the file itself (W8A8): one static scale
            and zero point for what each int8 weight is multiplied with, as ``QuantizeLinear`` -> ``DequantizeLinear``, which
            compilers for other chips read. Measure the model's answers before either is used.
        external_data: weights in ``NAME.onnx.data``; None for those of more than 2 GB, and for two files.
        verify: run the file in ONNX Runtime and compare it with torch.
        steps: how many model calls a sampling run has, for passes that work across denoising steps and whose plan does not say.
        decode: the arguments of a call for one more token, where they are not the prompt's cut to one token.
        skip_sites: by name of a pass, sites that it leaves alone.
        calibration: keyword arguments of calls, from which ``qdq`` takes its ranges besides those of the example.
        debug: write the graph before and after each pass, as ``ACCELPASS_DEBUG`` and ``options={"debug": True}`` do elsewhere.

    Raises:
        ExportError: the model, a pass or a file is in the way; says what to do. Nothing is left behind.
        OptionError: a pass or option that does not exist.
        PassError: a pass failed.
    """
    require_packages(*(("onnx", "onnxscript", "onnxruntime") if verify else ("onnx", "onnxscript")))
    from accelpass.backends.onnx.export import export, wanted

    want = wanted(passes, plan, opset, contrib, activations, skip_sites, debug)
    return export(
        model,
        args,
        path,
        want,
        kwargs,
        dynamic_shapes,
        external_data,
        verify,
        decode,
        step_count=steps,
        calibration=calibration,
    )
