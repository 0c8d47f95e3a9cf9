"""Checkpoints of compressed-tensors (llm-compressor): codes packed in words, plain int8, or fp8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accelpass.checkpoints.codes import FORMATS, Checkpoint, CheckpointError, grouped, unpacked
from accelpass.ir.linear.floats import FP8
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import ActivationFormat, LinearSpec
from accelpass.passes.quantization.int8_dynamic import Int8PerToken
from accelpass.passes.quantization.int8_static import Int8Static
from accelpass.passes.quantization.prequantized import Stored

READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "output_scale",
)  # fmt: skip


def read_compressed(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Checkpoint:
    """W = (code - zero) * scale, with a scale for the tensor, a row, or a group of a row.

    Products are formed in float32; the library that wrote the file rounds them to the scale's dtype.
    """
    whole = settings.get("format")
    schemes = list(settings.get("config_groups", {}).values())
    found = Checkpoint("compressed-tensors")
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    for module in sorted(modules):
        parts = {part: tensors[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in tensors}
        scheme = _scheme(module, schemes)
        form = scheme.get("format") or whole
        if form not in READ:
            raise CheckpointError(f"{module} is in the format {form!r}; {', '.join(READ)} are read")
        found.weights[f"{module}.weight"] = _one(module, parts, scheme, form)
    held = {f"{module}.{part}" for module in modules for part in _PARTS}
    found.floats = {name: t for name, t in tensors.items() if name not in held}
    return found


def _scheme(module: str, schemes: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The settings for a module: those of a target that names it, or else of one that names its class."""
    named = [s for s in schemes for t in s.get("targets", ()) if _names(t, module)]
    by_class = [s for s in schemes if "Linear" in s.get("targets", ())]
    for scheme in (*named, *by_class):
        return scheme
    raise CheckpointError(f"no group of the checkpoint's config_groups is for {module}")


def _names(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _one(module: str, parts: Mapping[str, Tensor], scheme: Mapping[str, Any], form: str) -> Stored:
    weights, inputs = scheme.get("weights") or {}, scheme.get("input_activations")
    bits, kind, scale = weights.get("num_bits"), weights.get("type", "int"), parts["weight_scale"].float()
    if kind == "float" or form == "float-quantized":
        return _fp8(module, parts["weight"], scale, weights)
    if bits not in FORMATS:
        raise CheckpointError(f"{module} has {bits!r} bits; {', '.join(map(str, FORMATS))} are read")
    middle = 2 ** (bits - 1)
    if "weight_packed" in parts:
        outputs, channels = (int(n) for n in parts["weight_shape"])
        codes = unpacked(parts["weight_packed"], bits, channels)
    else:
        codes = parts["weight"].int() + middle
        outputs, channels = codes.shape
    scale = scale.reshape(-1, 1).expand(outputs, 1) if scale.dim() < 2 else scale
    if len(scale) != outputs or channels % scale.shape[1]:
        raise CheckpointError(f"{module} has scales {list(scale.shape)} for a weight of {outputs} x {channels}")
    zero = _zero(parts, bits, scale)
    if scale.shape[1] == 1 and bits == 8 and zero is None:
        rounds, known = _rounding(module, parts, inputs, outputs)
        packed = ((codes - middle).to(torch.int8), scale[:, 0].contiguous())
        return Stored(LinearSpec(Int8(), rounds), packed, known=known)
    if inputs is not None:
        raise CheckpointError(
            f"{module} multiplies rounded inputs with {bits} bits in groups; only int8 by rows is read so"
        )
    order = parts.get("weight_g_idx")
    if order is not None and bool((order >= 0).all()):
        order = order.long().argsort(stable=True)
        return grouped(codes[:, order], scale, zero, bits, order)
    return grouped(codes, scale, zero, bits)


def _rounding(
    module: str, parts: Mapping[str, Tensor], inputs: Mapping[str, Any] | None, outputs: int
) -> tuple[ActivationFormat | None, tuple[Tensor, ...]]:
    """How the input of int8 products is rounded, and by what."""
    if inputs is None:
        return None, ()
    if inputs.get("type", "int") != "int" or inputs.get("num_bits", 8) != 8:
        raise CheckpointError(
            f"{module} rounds its input to {inputs.get('num_bits')} bits of {inputs.get('type')}; 8 of int are read"
        )
    if inputs.get("dynamic"):
        return Int8PerToken(), ()
    step, zero = parts.get("input_scale"), parts.get("input_zero_point")
    if step is None or step.numel() != 1 or (zero is not None and bool(zero.any())):
        raise CheckpointError(
            f"{module} rounds its input by a range of its own with a zero point, or by several; one symmetric is read"
        )
    return Int8Static(), (step.float().reshape(1).expand(outputs).contiguous(),)


def _zero(parts: Mapping[str, Tensor], bits: int, scale: Tensor) -> Tensor | None:
    """Zero points as codes ``(out, groups)``, or None for the middle of the range."""
    zero = parts.get("weight_zero_point")
    if zero is None:
        return None
    if "weight_packed" in parts and zero.dtype == torch.int32 and zero.shape != scale.shape:
        return unpacked(zero.t().contiguous(), bits, len(scale)).t().float()
    plain = zero.float().reshape(-1, 1).expand(len(scale), 1) if zero.dim() < 2 else zero.float()
    return plain + 2 ** (bits - 1) if bool(plain.any()) else None


def _fp8(module: str, weight: Tensor, scale: Tensor, settings: Mapping[str, Any]) -> Stored:
    if weight.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"{module} is {weight.dtype}; of floats float8_e4m3fn is read")
    if scale.numel() not in (1, len(weight)):
        strategy = settings.get("strategy")
        raise CheckpointError(f"{module} has fp8 scales {list(scale.shape)} ({strategy}); one, or one a row, is read")
    return Stored(LinearSpec(FP8()), (weight, scale.reshape(-1).expand(len(weight)).contiguous()))
