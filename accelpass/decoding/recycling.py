"""Guesses from what the model said last time (Token Recycling, arXiv 2408.08696, ACL 2025)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.driver import Decoder
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request, Verified
from accelpass.decoding.tree import Tree, named

CANDIDATES = 8
_FORMAT = "accelpass token recycling 1"
_COUNTS = """
:8 0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1
00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1
000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1
0000:3 0001:1 0002:1 0010:1 0100:1 1000:1
00000:2 00010:1
"""
CHILDREN: dict[tuple[int, ...], int] = {
    tuple(map(int, path)): int(count) for path, count in (item.split(":") for item in _COUNTS.split())
}
"""How many children each node of the paper's tree has: 80 nodes under the root, the deepest at depth 6."""


class TokenRecycling(Proposer):
    """Of each token of the vocabulary, the 8 likeliest successors when it was last read; a tree of them is verified at once.

    The matrix of successors starts at 0 (then guesses are wrong and the text right), learns from each row that the model computes
    while it decodes, and is kept over requests. Where the cache cannot hold a tree (it evicts, rounds by importance or chooses rows) and
    in batches, the likeliest successors are a chain.

    Attributes:
        matrix: successors ``(vocabulary, 8)``, int32; None before the first request.
    """

    def __init__(self, nodes: int = 80, matrix: Tensor | None = None) -> None:
        most = sum(CHILDREN.values())
        if not 1 <= nodes <= most:
            raise DecodingError(f"nodes={nodes}: the paper's tree has {most} guesses; use 1 to {most}")
        self.nodes, self.matrix = nodes, matrix
        self._trees: dict[int, Tree] = {}

    def start(self, request: Request) -> Drafter:
        if self.matrix is None:
            self.matrix = torch.zeros((request.vocabulary, CANDIDATES), dtype=torch.int32)
        if self.matrix.shape[0] != request.vocabulary:
            raise DecodingError(
                f"the successors are of a vocabulary of {self.matrix.shape[0]} tokens, the model has {request.vocabulary}; make a "
                "token_recycling() for each model"
            )
        self.matrix = self.matrix.to(request.ids.device)
        return _Recycler(self, request)

    def tree(self, guesses: int) -> Tree:
        """The part of the paper's tree that holds so many guesses, those first that are accepted most often.

        How often is estimated from the ranks (inferred): each rank half as often as the one before it, the first six times in ten.
        """
        if guesses not in self._trees:
            likely = sorted(named(CHILDREN)[1:], key=lambda n: (sum(rank + 0.75 for rank in n), n))[:guesses]
            self._trees[guesses] = Tree.among([(), *sorted(likely, key=lambda n: (len(n), n))])
        return self._trees[guesses]

    def save(self, folder: str | Path) -> None:
        """Write the successors, so that a later process begins with them: ``token_recycling.json`` and ``.safetensors``."""
        from safetensors.torch import save_file

        if self.matrix is None:
            raise DecodingError("no request was answered yet, so there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        said = {"format": _FORMAT, "vocabulary": self.matrix.shape[0], "nodes": self.nodes}
        (folder / "token_recycling.json").write_text(json.dumps(said, indent=2) + "\n")
        save_file({"successors": self.matrix.cpu().contiguous()}, folder / "token_recycling.safetensors")

    @staticmethod
    def load(folder: str | Path) -> TokenRecycling:
        """What :meth:`save` wrote.

        Raises:
            DecodingError: the folder holds none, or of another format.
        """
        from safetensors.torch import load_file

        try:
            said = json.loads((Path(folder) / "token_recycling.json").read_text())
            matrix = load_file(Path(folder) / "token_recycling.safetensors")["successors"]
        except (OSError, ValueError, KeyError) as cause:
            raise DecodingError(
                f"{folder} holds no saved successors ({cause}); TokenRecycling.save writes them"
            ) from cause
        if said.get("format") != _FORMAT:
            raise DecodingError(f"{folder} is of format {said.get('format')!r}; this version reads {_FORMAT!r}")
        return TokenRecycling(said["nodes"], matrix)


class _Recycler(Drafter):
    def __init__(self, memory: TokenRecycling, request: Request) -> None:
        self.memory, self.request, self.branches = memory, request, request.trees

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        matrix, device = self.memory.matrix, self.request.ids.device
        assert matrix is not None
        last = torch.tensor([[line[-1]] for line in text], device=device)
        guesses = [last]
        if not self.request.trees:
            for _ in range(min(most, self.memory.nodes)):
                guesses.append(matrix[guesses[-1], 0].long())
            return Proposal(torch.cat(guesses[1:], 1))
        tree = self.memory.tree(min(most, self.memory.nodes)).on(device)
        tokens = last
        for low, high in tree.levels:  # a depth at a time, from the one above it
            parents, ranks = tree.parents[low - 1 : high - 1], tree.ranks[low - 1 : high - 1]
            tokens = torch.cat([tokens, matrix[tokens[:, parents], ranks].long()], 1)
        return Proposal(tokens[:, 1:], tree=tree)

    def observe(self, verified: Verified, accepted: int) -> None:
        matrix = self.memory.matrix
        assert matrix is not None
        width = min(CANDIDATES, verified.logits.shape[-1])
        found = verified.logits.topk(width, -1).indices.flatten(0, 1)
        matrix[verified.read.flatten(), :width] = found.to(matrix.dtype)


def token_recycling(nodes: int = 80, *, memory: TokenRecycling | None = None, **options: Any) -> Decoder:
    """Decode with trees of the successors that each token had when it was last read: nothing is trained and no draft model is needed.

    Args:
        nodes: guesses of a tree. The paper's 80 are for accelerators; on a CPU, 7 cost little more than one token.
        memory: successors of another decoder, or loaded ones.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    memory = TokenRecycling(nodes) if memory is None else memory
    sizes = options.pop("sizes", (1, min(8, memory.nodes + 1), memory.nodes + 1))
    return Decoder(memory, sizes=sizes, **options)
