"""``load_quantized``: a checkpoint that another tool has quantized, run from its own codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.checkpoints.codes import Checkpoint, CheckpointError
from accelpass.checkpoints.reading import read
from accelpass.passes.core.plan import Plan
from accelpass.passes.quantization.bases.stored_codes import probe
from accelpass.passes.quantization.prequantized import Prequantized


def load_quantized(model: nn.Module, path: str | Path, **options: Any) -> Any:
    """``model`` compiled to compute with the codes of a checkpoint, none of which is rounded again.

    Read are folders of safetensors by GPTQ (2, 3, 4 and 8 bits, columns in any order), AWQ (4 bits, ``gemm``) and compressed-tensors
    (``pack-quantized``, ``int-quantized``, ``float-quantized``), and GGUF files with Q4_0, Q4_1, Q8_0, Q4_K and Q6_K of llama, qwen2
    and qwen3. The decoded numbers are the file's bit for bit, with products formed in float32; those of types with a minimum for each
    group (Q4_1, Q4_K) are so to one rounding of float32.

    Args:
        model: of the checkpoint's architecture, with any weights, not compiled; it is given what the checkpoint has, so that it runs
            uncompiled too. With ``free_weights=True`` the floats of packed weights are released.
        path: a ``.gguf`` file, or a folder.
        options: of ``torch.compile``: ``lowering``, ``free_weights``, ``passes`` (beside), ...

    Raises:
        CheckpointError: an unknown format, a damaged file, or a checkpoint of another model; says what is read.
    """
    return torch.compile(model, backend="accelpass", options=options | {"plan": quantized_plan(model, path)})


def quantized_plan(model: nn.Module, path: str | Path) -> Plan:
    """A plan with a checkpoint's codes, for the pass ``prequantized``; ``model`` is given its numbers."""
    checkpoint = read(Path(path).expanduser(), model)
    values = {name: stored.values() for name, stored in checkpoint.weights.items()}
    _put(model, checkpoint, checkpoint.floats | values, path)
    tensors: dict[str, Tensor] = {}
    for name, stored in checkpoint.weights.items():
        path = _first_name(model, name)
        tensors |= stored.artefacts(path) | {f"{Prequantized.name}/{path}/probe": probe(values[name])}
    return Plan.of(model, [Prequantized()], tensors)


def _put(model: nn.Module, checkpoint: Checkpoint, tensors: dict[str, Tensor], path: str | Path) -> None:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    where = f"{path} ({checkpoint.kind})"
    if unknown := [name for name in tensors if name not in own]:
        raise CheckpointError(f"{where} has {_some(unknown)}, which this {type(model).__name__} does not have")
    given = {id(own[name]) for name in tensors}
    if missing := [n for n, p in model.named_parameters() if id(p) not in given]:
        raise CheckpointError(f"{where} has no {_some(missing)}, which this {type(model).__name__} needs")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            seen, wanted = list(tensor.shape), list(own[name].shape)
            raise CheckpointError(
                f"{where} has {name} as {seen}, and the model has it as {wanted}: it is of another model"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _first_name(model: nn.Module, name: str) -> str:
    """What a graph calls a tied weight: the first of its names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return next(n for n, p in named.items() if p is named[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
