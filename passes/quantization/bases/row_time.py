"""How long one row takes through a weight in a format, measured on this machine."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from accelpass.ir.linear.gemv_probe import quickest
from accelpass.ir.torch_private import tracing

_COLD = 64_000_000


@cache
def microseconds_of_row(form: str, group_size: int, out_features: int, in_features: int) -> float:
    """The shortest of several runs of a linear compiled by torch.compile, its call included; ``float`` is a weight as it is.

    Several layers take turns: a model's weight is not in the cache when its layer runs. Kept for the process.
    """
    count = max(1, min(8, _COLD // (4 * out_features * in_features)))
    stored = {"name": "weight_format", "format": form, "group_size": group_size}
    layers = [nn.Linear(in_features, out_features, bias=False).eval() for _ in range(count)]
    options: dict[str, Any] = {"passes": [] if form == "float" else [stored]}
    with tracing(None), torch.no_grad():
        # One function for all: they share its code.
        fast = torch.compile(lambda layer, x: layer(x), backend="accelpass", options=options, dynamic=False)
        x = torch.ones(1, in_features)
        (seconds,) = quickest(lambda run: fast(layers[run % count], x))
    return seconds * 1e6
