"""The semantic op ``accelpass::linear_max``: a linear, steps on each of its scores, and their maximum over rows.

What it stands for holds a score for each row and output at once; its reference computes a few outputs at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.linear.op import LINEAR

TILE = 1 << 18
"""Scores that are there at a time."""


def written(steps: Sequence[fx.Node], linear: fx.Node, beside: Sequence[fx.Node]) -> str | None:
    """Steps between a linear and its maximum as text; None if one has an argument that text cannot hold."""
    numbers = {linear: 0, **{step: n for n, step in enumerate(steps, 1)}}
    others = {node: n for n, node in enumerate(beside)}

    def argument(given: Any) -> Any:
        if isinstance(given, fx.Node):
            return {"value": numbers[given]} if given in numbers else {"beside": others[given]}
        if isinstance(given, torch.dtype):
            return {"dtype": str(given).removeprefix("torch.")}
        return given

    made = []
    for step in steps:
        target: Any = step.target
        name = (
            target._opname[:-1] if target._opname.endswith("_") else target._opname
        )  # in place: the score itself is not kept
        if not hasattr(torch.ops.aten, name) or not hasattr(getattr(torch.ops.aten, name), target._overloadname):
            return None
        made.append(
            [
                name,
                target._overloadname,
                [argument(a) for a in step.args],
                {k: argument(v) for k, v in step.kwargs.items()},
            ]
        )
    try:
        return json.dumps(made)
    except TypeError:
        return None


def stepped(scores: Tensor, beside: Sequence[Tensor], steps: str) -> Tensor:
    """What :func:`written` has written, of some of the scores."""
    values = [scores]

    def argument(given: Any) -> Any:
        match given:
            case {"value": n}:
                return values[n]
            case {"beside": n}:
                return beside[n]
            case {"dtype": name}:
                return getattr(torch, name)
        return given

    for name, overload, args, kwargs in json.loads(steps):
        call = getattr(getattr(torch.ops.aten, name), overload)
        values.append(call(*map(argument, args), **{k: argument(v) for k, v in kwargs.items()}))
    return values[-1]


def tiles(
    outputs: int,
    size: int,
    scores: Callable[[slice], Tensor],
    beside: Sequence[Tensor],
    steps: str,
    dims: Sequence[int],
    keepdim: bool,
) -> Iterator[Tensor]:
    """The maxima of ``size`` outputs at a time."""
    for at in range(0, outputs, size):
        yield stepped(scores(slice(at, min(at + size, outputs))), beside, steps).amax(list(dims), keepdim)


@torch.library.custom_op("accelpass::linear_max", mutates_args=())
def linear_max(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    spec: str,
    beside: Sequence[Tensor],
    steps: str,
    dims: Sequence[int],
    keepdim: bool,
) -> Tensor:
    """The maximum over ``dims`` of ``steps`` of ``x W^T + bias``, where x is ``(..., in)`` and the last of ``dims`` is not its last.

    Args:
        operands: W ``(out, in)`` itself if ``spec`` is empty, else the operands of a packed one, as ``accelpass::linear`` has them.
        beside: masks, which have one value for all outputs.
        steps: pointwise operations, see :func:`written`.
    """
    outputs, rows = operands[0].shape[0], max(x.numel() // max(x.shape[-1], 1), 1)

    def scores(part: slice) -> Tensor:
        few, own = [o[part] for o in operands], None if bias is None else bias[part]
        return LINEAR(x, few, own, spec) if spec else F.linear(x, few[0], own)

    size, made = max(1, TILE // rows), None
    for number, tile in enumerate(tiles(outputs, size, scores, beside, steps, dims, keepdim)):
        if made is None:
            made = tile.new_empty((*tile.shape[:-1], outputs))
        made[..., number * size : number * size + tile.shape[-1]] = tile
    assert made is not None, "a linear has outputs"
    return made


@linear_max.register_fake
def _(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    spec: str,
    beside: Sequence[Tensor],
    steps: str,
    dims: Sequence[int],
    keepdim: bool,
) -> Tensor:
    scores = x.new_empty((*x.shape[:-1], operands[0].shape[0]))
    return stepped(scores, beside, steps).amax(list(dims), keepdim)


LINEAR_MAX = torch.ops.accelpass.linear_max.default
