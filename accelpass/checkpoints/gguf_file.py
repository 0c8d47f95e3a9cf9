"""GGUF files (llama.cpp): blocks of codes with their scales, named and ordered as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.checkpoints.codes import Checkpoint, CheckpointError, grouped, with_minimum
from accelpass.passes.quantization.prequantized import Stored

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Whose tensors are the model's own, but for their names and the order of rows."""


def q4_0(blocks: Tensor) -> Stored:
    """32 codes: ``(code - 8) * d``. Exact."""
    return grouped(_halves(blocks[..., 2:]), _half(blocks[..., :2]), None, 4)


def q4_1(blocks: Tensor) -> Stored:
    """32 codes: ``code * d + m``. To one rounding of float32."""
    return with_minimum(_halves(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]), 4)


def q8_0(blocks: Tensor) -> Stored:
    """32 signed codes: ``code * d``. Exact."""
    return grouped((blocks[..., 2:].view(torch.int8).int() + 128).flatten(1), _half(blocks[..., :2]), None, 8)


def q4_k(blocks: Tensor) -> Stored:
    """256 codes in eight groups: ``code * (d * s) - dmin * m``, with s and m of six bits. To one rounding of float32."""
    d, dmin = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    low, high, both = blocks[..., 4:16].int().unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([low & 63, (both & 15) | (low >> 6 << 4)], -1)
    mins = torch.cat([high & 63, (both >> 4) | (high >> 6 << 4)], -1)
    pairs = blocks[..., 16:].unflatten(-1, (4, 32))
    codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(1)
    scale, least = ((a.unsqueeze(-1) * b.float()).flatten(1) for a, b in ((d, scales), (-dmin, mins)))
    return with_minimum(codes, scale, least, 4)


def q6_k(blocks: Tensor) -> Stored:
    """256 codes in sixteen groups: ``(code - 32) * (d * s)``, with s of eight bits. Exact."""
    low, high = blocks[..., :128].unflatten(-1, (2, 64)), blocks[..., 128:192].unflatten(-1, (2, 32))
    nibbles = torch.stack([low & 15, low >> 4], -2).flatten(-2).unflatten(-1, (4, 32))
    pairs = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -2)
    scales, d = blocks[..., 192:208].view(torch.int8).float(), _half(blocks[..., 208:])
    return grouped((nibbles | (pairs << 4)).flatten(1), (scales * d.unsqueeze(-1)).flatten(1), None, 6)


TYPES: dict[str, tuple[Callable[[Tensor], Stored], int]] = {
    "Q4_0": (q4_0, 18), "Q4_1": (q4_1, 20), "Q8_0": (q8_0, 34), "Q4_K": (q4_k, 144), "Q6_K": (q6_k, 210),
}  # fmt: skip
"""By type, its reader and the bytes of a block."""


def read_gguf(path: Path, model: nn.Module) -> Checkpoint:
    """The tensors of a file by the paths of a transformers model.

    Raises:
        CheckpointError: the file is no GGUF, of an architecture or a type that is not read, or the gguf package is missing.
    """
    try:
        import gguf
    except ImportError as cause:
        raise CheckpointError(f"reading {path} needs the gguf package; pip install 'accelpass[hf]'") from cause
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as cause:
        raise CheckpointError(f"{path} is no GGUF file, or is cut short: {cause}") from cause
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path} is of the architecture {architecture!r}; {', '.join(ARCHITECTURES)} are read")
    count = int(reader.fields[f"{architecture}.block_count"].contents())
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(number, count)
    paths: dict[str, str] = {}
    for name in model.state_dict():
        module, _, part = name.rpartition(".")
        if (known := names.get_name(module)) is not None:
            paths.setdefault(f"{known}.{part}", name)
    found = Checkpoint("gguf")
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # the model's configuration has them
            continue
        if tensor.name not in paths:
            raise CheckpointError(f"{path} has {tensor.name}, for which this {type(model).__name__} has no parameter")
        rows = _rotary_rows(tensor.name, reader, architecture)
        _take(found, paths[tensor.name], tensor, rows)
    return found


def _take(found: Checkpoint, name: str, tensor: Any, rows: Callable[[int], Tensor] | None) -> None:
    kind, data = tensor.tensor_type.name, torch.from_numpy(tensor.data.copy())
    if kind in ("F32", "F16"):
        found.floats[name] = data if rows is None else data[rows(len(data))]
    elif kind == "BF16":
        floats = data.view(torch.bfloat16)
        found.floats[name] = floats if rows is None else floats[rows(len(data))]
    elif kind in TYPES:
        read, size = TYPES[kind]
        stored = read(data.unflatten(-1, (data.shape[-1] // size, size)))
        found.weights[name] = stored if rows is None else stored.rows(rows(len(data)))
    else:
        raise CheckpointError(f"{tensor.name} is {kind}; {', '.join(TYPES)}, F32, F16 and BF16 are read")


def _rotary_rows(name: str, reader: Any, architecture: str) -> Callable[[int], Tensor] | None:
    """Which row of the file each row of the model is: of ``llama``, queries and keys are stored with both halves of a head woven."""
    if architecture != "llama" or not any(f".{part}." in name for part in ("attn_q", "attn_k")):
        return None
    heads = reader.fields["llama.attention.head_count"].contents()
    if ".attn_k." in name and "llama.attention.head_count_kv" in reader.fields:
        heads = reader.fields["llama.attention.head_count_kv"].contents()
    return lambda rows: torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)


def _half(raw: Tensor) -> Tensor:
    """float16 numbers of two bytes each ``(..., 2)`` as float32 ``(...)``."""
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


def _halves(raw: Tensor) -> Tensor:
    """Codes of blocks whose low nibbles are the first half ``(rows, blocks, bytes)`` as ``(rows, codes)``."""
    return torch.cat([raw & 15, raw >> 4], -1).flatten(1)
