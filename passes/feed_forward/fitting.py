"""How small feed-forward layers are fitted to what big ones compute, and routers to where they err."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.analyses.structure.mlp import Mlp
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Run
from accelpass.passes.feed_forward.small_mlp import small_mlp

RIDGE = 1e-4
SAMPLE = 4096
"""Tokens of each layer that routers are fitted on."""


def fitted(
    program: Program, run: Run, sites: Sequence[Mlp], shrink: int, budget: float
) -> dict[str, dict[str, Tensor]]:
    """By layer, a small part with ``1 / shrink`` of the channels and a router that sends ``budget`` of the tokens to the big one."""
    paths = {site.path: _path(program, site.down.weight) for site in sites}
    big = {
        site.path: [_value(program, n) for n in (site.down.weight, site.down.bias) if n is not None] for site in sites
    }
    squares: dict[str, Tensor] = {}

    def norm(path: str, x: Tensor) -> None:
        squares[path] = squares.get(path, torch.zeros(())) + x.detach().float().flatten(0, -2).square().sum(0).cpu()

    run({paths[s.path]: partial(norm, s.path) for s in sites}, "hidden channels of the big layers")
    sums = {}
    for site in sites:
        count = max(1, round(site.down.in_features / shrink))
        rows = largest(squares[site.path].sqrt(), big[site.path][0].float().cpu(), count)
        sums[site.path] = Sums.none(rows, site.down.out_features)
    watches = {paths[s.path]: partial(_summed, sums[s.path], big[s.path]) for s in sites}
    run(watches, "outputs of the big layers")
    found: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        down, bias = sums[site.path].solved()
        found[site.path] = {"down": down, "bias": bias}
        for what, linear in (("up", site.up), ("gate", site.gate)):
            if linear is not None:
                weight = _value(program, linear.weight)
                rows = weight.t() if linear.transposed else weight
                found[site.path][what] = rows[sums[site.path].rows.to(rows.device)].float().cpu().contiguous()
    errors = {s.path: _Errors(s.activation, found[s.path], big[s.path]) for s in sites}
    watched: dict[str, Any] = {_path(program, s.up.weight): errors[s.path].inputs for s in sites}
    watched |= {
        paths[s.path]: errors[s.path].outputs for s in sites
    }  # after the inputs: watches are called in this order
    run(watched, "errors of the small layers")
    made = [(torch.cat(e.x), torch.cat(e.error)) for e in errors.values()]
    routers = fitted_router([x for x, _ in made], [e for _, e in made], budget)
    for path, router in zip(errors, routers, strict=True):
        found[path]["router"] = router
    return found


@dataclass
class Sums:
    """What the least squares of one layer need of the data.

    Attributes:
        rows: the hidden channels of the big layer that the small one has.
        inner, outer: sums of ``a a^T`` and ``y a^T`` over tokens, ``a`` the hidden channels with a 1 behind them, ``y`` the big
            layer's output.
    """

    rows: Tensor
    inner: Tensor
    outer: Tensor

    @classmethod
    def none(cls, rows: Tensor, out: int) -> Sums:
        size = len(rows) + 1
        return cls(rows, torch.zeros(size, size, dtype=torch.float64), torch.zeros(out, size, dtype=torch.float64))

    def add(self, hidden: Tensor, down: Tensor, bias: Tensor | None = None) -> None:
        """``hidden``: the big layer's channels ``(..., inner)`` of some tokens."""
        all_of = hidden.detach().flatten(0, -2).float()
        made = F.linear(all_of, down.detach().float(), None if bias is None else bias.detach().float()).double()
        some = all_of[:, self.rows.to(all_of.device)].double()
        some = torch.cat([some, some.new_ones(len(some), 1)], 1)
        self.inner += (some.T @ some).cpu()
        self.outer += (made.T @ some).cpu()

    def solved(self) -> tuple[Tensor, Tensor]:
        """The last linear's weight ``(out, inner)`` and bias, with the least squared error of the big layer's output."""
        size = len(self.rows)
        ridge = RIDGE * self.inner.diagonal()[:size].mean().clamp_min(1e-12)
        square = self.inner.clone()
        square.diagonal()[:size] += ridge
        solved = torch.linalg.solve(square, self.outer.T).T.float()
        return solved[:, :size].contiguous(), solved[:, size].contiguous()


def largest(norms: Tensor, down: Tensor, count: int) -> Tensor:
    """The hidden channels that add most to the output, ascending: norm of the channel times norm of its column of ``down``."""
    scores = norms.double() * down.detach().double().norm(dim=0).to(norms.device)
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def fitted_router(inputs: Sequence[Tensor], errors: Sequence[Tensor], target: float, steps: int = 300) -> list[Tensor]:
    """Routers ``(2, in)``, small and big, that send tokens to the big layer where the small one errs.

    The loss is what tokens err by, weighted by the probability of the small layer, and the square of what the mean probability of
    the big one misses its target by, over all layers; the temperature falls from 1 to 0.1 meanwhile.

    Args:
        inputs: by layer, ``(tokens, in)``.
        errors: by layer, ``(tokens,)``: squared error of the small layer's output, of the big one's mean square.
    """
    draw = torch.Generator().manual_seed(0)
    scales = [x.float().square().mean().sqrt().clamp_min(1e-6) for x in inputs]
    routers = [(0.01 * torch.randn(2, x.shape[1], generator=draw)).requires_grad_() for x in inputs]
    levels = [e.float().clamp(max=10.0) for e in errors]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(routers, lr=0.05)
        for step in range(steps):
            temperature = 10.0 ** (-step / max(steps - 1, 1))
            big = [
                ((x.float() / s) @ r.T / temperature).softmax(-1)[:, 1]
                for x, s, r in zip(inputs, scales, routers, strict=True)
            ]
            erring = torch.stack([((1 - p) * e).mean() for p, e in zip(big, levels, strict=True)]).mean()
            missed = (torch.cat(big).mean() - target).square()
            optimizer.zero_grad()
            (erring + 100 * missed).backward()
            optimizer.step()
    return [(r.detach() / s).contiguous() for r, s in zip(routers, scales, strict=True)]


class _Errors:
    """What the small layer errs by on a sample of tokens, of the mean square of the big one's output."""

    def __init__(self, activation: str, parts: dict[str, Tensor], held: list[Tensor]) -> None:
        self.activation, self.parts, self.held = activation, parts, held
        self.x: list[Tensor] = []
        self.error: list[Tensor] = []

    def inputs(self, x: Tensor) -> None:
        room = SAMPLE - sum(map(len, self.x))
        self.x.append(x.detach().flatten(0, -2)[:room].float().cpu())

    def outputs(self, hidden: Tensor) -> None:
        rows = hidden.detach().flatten(0, -2)[: len(self.x[-1])].float().cpu()
        weight, *bias = (t.detach().float().cpu() for t in self.held)
        big = F.linear(rows, weight, *bias)
        weights = [self.parts["up"], self.parts.get("gate"), self.parts["down"], self.parts["bias"]]
        small = small_mlp(self.x[-1], self.activation, *weights)  # type: ignore[arg-type]
        self.error.append((small - big).square().mean(-1) / big.square().mean().clamp_min(1e-12))


def _path(program: Program, node: Any) -> str:
    return program.tensors.path(node) or node.name


def _value(program: Program, node: Any) -> Tensor:
    held = program.tensors.value(node)
    assert held is not None
    return held.detach()


def _summed(sums: Sums, big: Sequence[Tensor], hidden: Tensor) -> None:
    sums.add(hidden, *big)
