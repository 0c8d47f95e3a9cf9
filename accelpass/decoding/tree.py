"""A tree of guesses: each node is named by the ranks of the guesses that lead to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Path = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """Node 0 is the last token of the text; parents come before their children.

    Attributes:
        parents, ranks: of each node but the root ``(nodes - 1,)``: the number of its parent, and which of its guesses it is.
        depths: of each node ``(nodes,)``.
        ancestors: which nodes each comes from, itself included, bool ``(nodes, nodes)``.
        paths: the nodes from the root to each, padded with the node itself, ``(nodes, deepest + 1)``.
    """

    parents: Tensor
    ranks: Tensor
    depths: Tensor
    ancestors: Tensor
    paths: Tensor

    @property
    def nodes(self) -> int:
        return self.depths.shape[0]

    @property
    def levels(self) -> list[tuple[int, int]]:
        """First node of each depth from 1, and of the next: nodes of a depth stand together."""
        counts = torch.bincount(self.depths).cumsum(0).tolist()
        return list(itertools.pairwise(counts))

    def on(self, device: torch.device) -> Tree:
        if self.depths.device == device:
            return self
        moved = (t.to(device) for t in (self.parents, self.ranks, self.depths, self.ancestors, self.paths))
        return Tree(*moved)

    @staticmethod
    def among(nodes: list[Path]) -> Tree:
        """A tree of these nodes, breadth first, the root ``()`` and every parent among them."""
        number = {node: i for i, node in enumerate(nodes)}
        deepest = max(map(len, nodes))
        paths = [[number[n[:d]] for d in range(len(n) + 1)] + [i] * (deepest - len(n)) for i, n in enumerate(nodes)]
        return Tree(
            torch.tensor([number[n[:-1]] for n in nodes[1:]], dtype=torch.int64),
            torch.tensor([n[-1] for n in nodes[1:]], dtype=torch.int64),
            torch.tensor([len(n) for n in nodes]),
            torch.tensor([[m == n[: len(m)] for m in nodes] for n in nodes]),
            torch.tensor(paths),
        )


def named(children: Mapping[Path, int]) -> list[Path]:
    """The nodes of a tree, breadth first, from how many children each has; nodes that are not given have none."""
    nodes: list[Path] = [()]
    for node in nodes:  # grows while it is walked
        nodes += [(*node, rank) for rank in range(children.get(node, 0))]
    return nodes
