"""Small feed-forward layers trained with the model around them, each token going through either size by chance (Duo-LLM, stage 1)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.mlp import mlps
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.tap import Tap, point_name
from accelpass.passes.core.base import Study
from accelpass.passes.feed_forward.small_mlp import small_mlp

RATE = 1e-3
Parts = Mapping[str, Mapping[str, Tensor]]


def trained(study: Study, parts: Parts, epochs: int, rate: float = RATE) -> dict[str, dict[str, Tensor]]:
    """Parts with less loss of the next token where each token of each layer goes through the small or the big one by chance.

    Every combination of sizes comes up, so that they can be exchanged for each other (arXiv 2410.10846, stage 1). Big layers stay as they
    are (inferred: a plan changes no weight of the model), and so do routers.

    Args:
        parts: by path of the MLP, ``up``, ``gate`` if there is one, ``down`` and ``bias``; see ``small_mlp``.
    """
    own = {path: {n: t.clone().requires_grad_() for n, t in part.items() if n in NAMES} for path, part in parts.items()}
    held = [t for part in own.values() for t in part.values()]
    dtypes: dict[str, torch.dtype] = {}
    optimizer = torch.optim.AdamW(held, lr=rate, weight_decay=0.0)

    def taps(program: Program) -> list[Tap]:
        dtypes.update({site.path: value(site.x).dtype for site in program.analysis(mlps)})
        return [
            Tap(
                point_name(site.path, "out"),
                partial(by_chance, activation=site.activation, gated=site.gate is not None),
                "replace",
                written=tuple(tuple(t.shape) for t in _ordered(own[site.path])),
                also=partial(_read, site.path),
            )
            for site in program.analysis(mlps)
            if site.path in own
        ]

    def given() -> Mapping[str, Tensor]:
        return {f"{point_name(path, 'out')}.{n}": t for path, part in own.items() for n, t in enumerate(_ordered(part))}

    for loss in study.losses(taps, given, "small and big layers by chance", epochs):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss.backward()
        optimizer.step()
    return {path: {**parts[path], **{n: t.detach() for n, t in part.items()}} for path, part in own.items()}


NAMES = ("up", "gate", "down", "bias")


def _ordered(part: Mapping[str, Tensor]) -> list[Tensor]:
    return [part[name] for name in NAMES if name in part]


def _read(path: str, program: Program) -> list[fx.Node]:
    """What an MLP reads."""
    return [next(site.x for site in program.analysis(mlps) if site.path == path)]


def by_chance(big: Tensor, x: Tensor, *weights: Tensor, activation: str, gated: bool) -> Tensor:
    """The small part's output for about half of the tokens, the big one's for the others."""
    up, *rest = weights
    gate = rest.pop(0) if gated else None
    chosen = torch.rand(x.shape[:-1], device=x.device) < 0.5
    return torch.where(chosen.unsqueeze(-1), small_mlp(x, activation, up, gate, *rest), big)
