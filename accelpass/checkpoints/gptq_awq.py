"""Checkpoints of GPTQ (AutoGPTQ, GPTQModel) and AWQ (AutoAWQ): a linear has ``qweight``, ``qzeros`` and ``scales``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accelpass.checkpoints.codes import Checkpoint, CheckpointError, grouped, unpacked
from accelpass.passes.quantization.prequantized import Stored

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each nibble of a word holds, from the lowest on."""


def read_gptq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Checkpoint:
    """``qweight`` (in * bits / 32, out) and ``qzeros`` (groups, out * bits / 32) are streams of bits along in and out.

    W = scale * (code - zero), where ``gptq`` files hold zero - 1 and ``gptq_v2`` files zero. ``g_idx`` (in,) names the group of each
    channel, which are in no order where columns were rounded by their importance (``desc_act``).
    """
    bits = settings.get("bits")
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(f"this GPTQ checkpoint has bits={bits!r}; 2, 3, 4 and 8 are read")
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def one(parts: Mapping[str, Tensor]) -> Stored:
        scales = parts["scales"].float().t()
        outputs, groups = scales.shape
        inputs = parts["qweight"].shape[0] * 32 // bits
        codes = unpacked(parts["qweight"].t().contiguous(), bits, inputs)
        zero = (unpacked(parts["qzeros"], bits, outputs).t() + less).float()
        order = _order(parts.get("g_idx"), inputs, groups)
        return grouped(codes if order is None else codes[:, order], scales, zero, bits, order)

    return _read("gptq", tensors, one)


def read_awq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Checkpoint:
    """``qweight`` (in, out / 8) and ``qzeros`` (groups, out / 8) hold eight columns a word, interleaved; W = scale * (code - zero)."""
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"this AWQ checkpoint has bits={bits!r} and version={version!r}; 4 and 'gemm' are read")

    def nibbles(words: Tensor) -> Tensor:
        codes = unpacked(words, 4, words.shape[1] * 8).unflatten(-1, (-1, 8))
        return codes[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(-2)

    def one(parts: Mapping[str, Tensor]) -> Stored:
        zero = nibbles(parts["qzeros"]).t().float() if "qzeros" in parts else None
        return grouped(nibbles(parts["qweight"]).t(), parts["scales"].float().t(), zero, 4)

    return _read("awq", tensors, one)


def _order(index: Tensor | None, inputs: int, groups: int) -> Tensor | None:
    """Which channel each column is of once groups are together; None where they are."""
    if index is None or torch.equal(index.long(), torch.arange(inputs) // (inputs // groups)):
        return None
    if not torch.equal(index.long().bincount(minlength=groups), torch.full((groups,), inputs // groups)):
        raise CheckpointError(f"g_idx does not name each of {groups} groups {inputs // groups} times")
    return index.long().argsort(stable=True)


def _read(kind: str, tensors: Mapping[str, Tensor], one: Any) -> Checkpoint:
    found = Checkpoint(kind)
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    parts: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in modules and part in ("qweight", "qzeros", "scales", "g_idx"):
            parts[module][part] = tensor
        else:
            found.floats[name] = tensor
    for module, held in sorted(parts.items()):
        missing = {"qweight", "scales"} - held.keys() | ({"qzeros"} - held.keys() if kind == "gptq" else set())
        if missing:
            raise CheckpointError(
                f"{module} has a qweight and no {', '.join(sorted(missing))}: the checkpoint is cut short"
            )
        found.weights[f"{module}.weight"] = one(held)
    return found
