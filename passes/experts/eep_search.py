"""EEP's evolution: which experts stay, and then how all are merged into as many (arXiv 2407.00945, and its authors' code)."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

Individual = dict[str, tuple[Tensor, Tensor]]
"""By layer, what merges its experts and what maps its router's probabilities, ``(new, experts)`` each."""
INITIAL, TOUCHED, REDRAWN = 30, 0.25, 0.15
CROSSED, FIRST, NOISE, ENTRY, RESCALED, TOP = 0.3, 0.6, 0.065, 0.25, 0.1, 6


def selection(merge: Tensor, route: Tensor) -> list[int] | None:
    """The experts that both matrices keep as they are, ascending; None if any row is something else."""
    one = bool(((merge == 0) | (merge == 1)).all() and (merge.sum(1) == 1).all() and torch.equal(merge, route))
    rows = sorted(merge.argmax(1).tolist())
    return rows if one and len(set(rows)) == len(rows) else None


class Evolution:
    """The population of one search; larger scores are better.

    Attributes:
        of: experts of each layer.
        keep: how many each layer is to have.
        near: see :class:`~accelpass.passes.experts.eep.EEP`.
    """

    def __init__(self, of: Mapping[str, int], keep: int, near: float, seed: int) -> None:
        self.of, self.keep, self.near = of, keep, near
        self.draw, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.scored: list[tuple[float, Individual]] = []

    def add(self, one: Individual, score: float) -> None:
        """A score that is no number is the worst."""
        self.scored.append((score if score == score else float("-inf"), one))

    def best(self, count: int) -> list[Individual]:
        """The best ones, of equal ones the earlier."""
        return [one for _, one in sorted(self.scored, key=lambda s: -s[0])[:count]]

    def selected(self) -> Individual:
        """Whole experts: drawn at first, then a good one with some exchanged for others."""
        if len(self.scored) < INITIAL:
            return {path: _rows(self.draw.sample(range(n), self.keep), n) for path, n in self.of.items()}
        parent, child = self._parent(3 * self.near), Individual()
        for path, experts in self.of.items():
            rows = parent[path][0].argmax(1).tolist()
            if self.draw.random() < TOUCHED:
                for at in range(self.keep):
                    unused = sorted(set(range(experts)) - set(rows))
                    if unused and self.draw.random() < REDRAWN:
                        rows[at] = self.draw.choice(unused)
            child[path] = _rows(rows, experts)
        return child

    def merged(self) -> Individual:
        """Sums of experts: of one or two good parents, with noise; both matrices by themselves."""
        crossed = self.draw.random() < CROSSED
        first = self._parent(self.near if crossed else 3 * self.near, TOP if crossed else 1)
        second = self._parent(self.near, TOP) if crossed else first
        child = Individual()
        for path in self.of:
            touched = self.draw.random() < TOUCHED
            whole = self.draw.random() < FIRST
            pair = [
                self._entries(a, b) if touched else (a if whole else b).clone()
                for a, b in zip(first[path], second[path], strict=True)
            ]
            if self.draw.random() < RESCALED:
                sums = pair[0].sum(1, keepdim=True)
                pair[0] = torch.where(sums.abs() > 1e-3, pair[0] / sums, pair[0])
            child[path] = pair[0], pair[1]
        return child

    def _entries(self, a: Tensor, b: Tensor) -> Tensor:
        """Row by row of one parent or the other, and some entries moved."""
        rows = torch.rand(len(a), 1, generator=self.noise) < FIRST
        moved = torch.rand(a.shape, generator=self.noise) < ENTRY
        return torch.where(rows, a, b) + NOISE * torch.randn(a.shape, generator=self.noise) * moved

    def _parent(self, near: float, least: int = 1) -> Individual:
        """One of those within ``near`` of the best, of ``least`` at least."""
        order = sorted(self.scored, key=lambda s: -s[0])
        count = sum(score >= order[0][0] - near for score, _ in order)
        return self.draw.choice(order[: max(count, least)])[1]


def _rows(rows: list[int], experts: int) -> tuple[Tensor, Tensor]:
    matrix = torch.eye(experts)[rows]
    return matrix, matrix.clone()
