"""Inputs to compare a file with: other values than the traced ones, for each input its own.

A file that reads the wrong input, or holds a traced value as a constant, answers the example call rightly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from accelpass.backends.export.functional import Functional


def others(made: Functional, fixed: Mapping[str, object]) -> tuple[dict[str, Tensor], str]:
    """The example inputs with other values, and a note where the model takes only the example's.

    Args:
        fixed: inputs whose values stay: state, and what a plan holds.
    """
    given = made.inputs
    floats = {name for name, t in given.items() if t.is_floating_point() and name not in fixed}
    for changed in (given.keys() - fixed.keys(), floats):
        inputs = {name: _other(name, t) if name in changed else t.clone() for name, t in given.items()}
        if _takes(made.gm, inputs):
            same = [name for name in given if name not in changed and name not in fixed]
            held = f"the example's {', '.join(same)}, as other values do not fit the model"
            return inputs, f"compared on {held}" if same else ""
    inputs = {name: t.clone() for name, t in given.items()}
    return inputs, "compared on the example's values alone, as others do not fit the model"


def _takes(gm: fx.GraphModule, inputs: Mapping[str, Tensor]) -> bool:
    """Whether torch runs the graph on these inputs, to numbers."""
    try:
        with torch.no_grad():
            made = gm(*(t.clone() for t in inputs.values()))
    except (RuntimeError, IndexError, ValueError):  # an index out of range, an assertion in the graph
        return False
    return not any(t.is_floating_point() and bool(t.isnan().any()) for t in made)


def _other(name: str, tensor: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if not tensor.numel() or tensor.is_complex():
        return tensor.clone()
    if tensor.is_floating_point():
        return _float(tensor, random)
    wide = tensor.long()
    least, most = int(wide.min()), int(wide.max())
    if tensor.dtype == torch.bool or (least, most) in ((0, 0), (0, 1), (1, 1)):
        return _flipped(wide, random).to(tensor.dtype)
    return _drawn(wide, least, most, random).to(tensor.dtype)


def _float(tensor: Tensor, random: torch.Generator) -> Tensor:
    """Smaller by random factors: signs stay, and so do the zeros and infinities of a mask."""
    factors = torch.rand(tensor.shape, generator=random) / 2 + 0.5
    base = tensor if bool(tensor.any()) else torch.randn(tensor.shape, generator=random)
    return (base.double() * factors).to(tensor.dtype)


def _flipped(mask: Tensor, random: torch.Generator) -> Tensor:
    """Another mask, or choice of two: one number of each row is flipped, and never the first, without which a row may be empty."""
    made, size = mask.clone(), mask.shape[-1] if mask.dim() else 1
    if size == 1:
        return made.fill_(1) if not bool(made.any()) else made
    made[..., int(torch.randint(1, size, (), generator=random))] ^= 1
    return made


def _drawn(tensor: Tensor, least: int, most: int, random: torch.Generator) -> Tensor:
    """Numbers of the same range; what rises, as positions and the ends of sequences do, still rises from end to end."""
    least = least if least < most else math.ceil(most / 2)
    made = torch.randint(least, most + 1, tensor.shape, generator=random)
    if tensor.dim() and tensor.shape[-1] > 1 and bool((tensor.diff(dim=-1) >= 0).all()):
        made = made.sort(-1).values
        made[..., 0], made[..., -1] = tensor[..., 0], tensor[..., -1]
    return made
