"""Independent ground truth for axes: one family captured at two batch sizes and token counts."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from accelpass.ir import attention
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.models_zoo import tiny

MORE = 7  # times as many sequences in the second capture: no other size there has this factor
TEXT = 5  # tokens of prompt in the second capture of a diffusion model
_LARGER = ("image/swin",)  # as it is built, its last stage has a single window
Kwargs = dict[str, Any]


def captured(model: nn.Module, insert: bool = True, dynamic: bool = False, **kwargs: Any) -> Program:
    """The model's only graph."""
    kept = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        kept.append(from_dynamo(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, dynamic=dynamic)(**kwargs)
    (program,) = kept
    if insert:
        attention.insert(program)
    return program


@cache
def built(key: str) -> Program:
    """The family as it is built."""
    build = tiny.family(key).build()
    model, kwargs = _other(key, build.model, build.kwargs, 2) if key in _LARGER else (build.model, build.kwargs)
    return captured(model, **kwargs)


def pair(key: str) -> tuple[Program, Program]:
    """The family as it is built, and with MORE times the batch and other numbers of tokens."""
    build = tiny.family(key).build()
    model, kwargs = _other(key, build.model, build.kwargs, 3 if key in _LARGER else 1.5)
    return built(key), captured(model, **{k: _more(v) for k, v in kwargs.items()})


def matched(one: Program, two: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Nodes that do the same in both captures. Tables are sometimes computed by other operators at another size."""
    a, b = (list(p.graph.nodes) for p in (one, two))
    kinds = [[_kind(n) for n in nodes] for nodes in (a, b)]
    for i, j, count in difflib.SequenceMatcher(None, *kinds, autojunk=False).get_matching_blocks():
        yield from zip(a[i : i + count], b[j : j + count], strict=True)


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":  # a table may be an input at one size only
        return str(getattr(getattr(node, "_dynamo_source", None), "name", node.name))
    return str(node.target)


def growth(one: fx.Node, two: fx.Node) -> Iterator[tuple[int, int, bool, bool]]:
    """(dimension, size in the second capture, batch changed, number of tokens changed) of a tensor."""
    a, b = value(one), value(two)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim():
        for dim, (before, after) in enumerate(zip(a.shape, b.shape, strict=True)):
            batches = _sevens(after) - _sevens(before)
            yield dim, after, batches > 0, after != before * MORE**batches


def _sevens(size: int) -> int:
    count = 0
    while size and size % MORE == 0:
        size, count = size // MORE, count + 1
    return count


def _more(given: Any) -> Any:
    batched = isinstance(given, Tensor) and given.dim() > 0 and given.shape[0] == tiny.BATCH
    return torch.cat([given] * MORE) if batched else given


def _other(key: str, model: nn.Module, kwargs: Kwargs, scale: float) -> tuple[nn.Module, Kwargs]:
    kind, _, name = key.partition("/")
    if kind == "image":
        size = int(kwargs["pixel_values"].shape[-1] * scale)
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "image_size"):
            config.image_size = [size, size] if isinstance(config.image_size, list | tuple) else size
        return type(model)(config).eval(), {"pixel_values": torch.randn(tiny.BATCH, 3, size, size)}
    if kind == "diffusion":
        return model, {**kwargs, **_LATENTS[name]}
    return model, {k: v[:, :-2] if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in kwargs.items()}


def _positions(rows: int) -> Tensor:
    at = torch.arange(rows)
    return torch.stack([torch.zeros(rows), at // 4, at % 4], dim=-1).float()


_LATENTS: dict[str, Kwargs] = {
    "cogvideox": {"hidden_states": torch.randn(2, 5, 4, 8, 8)},
    "dit": {"hidden_states": torch.randn(2, 4, 12, 12)},
    "flux": {
        "hidden_states": torch.randn(2, 24, 16),
        "img_ids": _positions(24),
        "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "txt_ids": torch.zeros(TEXT, 3),
    },
    "hunyuan_video": {"hidden_states": torch.randn(2, 4, 5, 8, 12)},
    "ltx_video": {"hidden_states": torch.randn(2, 5 * 4 * 6, 8), "num_frames": 5, "width": 6},
    "pixart": {"hidden_states": torch.randn(2, 4, 8, 12)},
    "sd3": {"hidden_states": torch.randn(2, 4, 6, 8), "encoder_hidden_states": torch.randn(2, TEXT, 32)},
    "wan": {"hidden_states": torch.randn(2, 4, 5, 8, 12), "encoder_hidden_states": torch.randn(2, TEXT, 32)},
}
