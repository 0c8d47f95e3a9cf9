"""Which rows of an axis are kept, and where they lie in dimensions that hold the axis beside others or in pieces.

Everything here is plain numbers and strings, so that a description is part of a recipe's key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.tensors import placed

CHOSEN, PIECES = "chosen", "pieces"
Leaf = int | tuple[Any, ...]
"""An axis of a dimension: its size if it stays whole; ``("chosen", size, count)`` for the axis that rows are taken out of;
``("pieces", size, ((start, step, leaves), ...))`` for one that holds such an axis in some of its rows."""
Leaves = tuple[Leaf, ...]


@dataclass(frozen=True, eq=False)
class Static:
    """The rows of an axis that are kept: how many is known, which may depend on weights.

    Attributes:
        count: how many, at least 1.
        by: makes one int64 tensor ``(count,)`` of ascending rows from the tensors of ``of``.
        of: model tensors, or what is derived from them; none if the rows are numbers.
        fill: what rows that are gone are, where a region ends that callers see whole; None where none may read them.
    """

    count: int
    by: Recipe
    of: tuple[fx.Node, ...] = ()
    fill: float | None = None

    @classmethod
    def rows(cls, rows: Sequence[int]) -> Static:
        """These rows, whatever the weights.

        Raises:
            ValueError: none, not ascending, or one below 0.
        """
        kept = tuple(int(r) for r in rows)
        if not kept:
            raise ValueError("no row would be left; keep at least one")
        if kept[0] < 0 or any(a >= b for a, b in itertools.pairwise(kept)):
            raise ValueError(f"rows are ascending numbers from 0, each once; these begin with {list(kept[:8])}")
        return cls(len(kept), Recipe(("rows", kept), lambda *_: (torch.tensor(kept),)))

    @classmethod
    def best(cls, count: int, score: Recipe, of: Sequence[fx.Node]) -> Static:
        """The ``count`` rows that score highest; of equal ones the first.

        Args:
            score: makes ``(size,)`` from the tensors of ``of``.
        """

        def chosen(*given: Tensor) -> tuple[Tensor]:
            (scores,) = score.fn(*given)
            # NaN would sort as the largest; a row that is not a number is the first to go.
            scores = scores.nan_to_num(nan=float("-inf"))
            return (scores.argsort(descending=True, stable=True)[:count].sort().values,)

        return cls(count, Recipe(("best", count, score.key), chosen), tuple(of))

    def of_tensor(self, tensor: Tensor, dims: Mapping[int, Leaves], made: Tensor) -> Tensor:
        """The kept rows of a weight.

        Args:
            dims: the dimensions that have the axis, and how it lies in each.
            made: what ``by`` makes.
        """
        made = made.to(tensor.device)
        for dim, leaves in dims.items():
            tensor = tensor.index_select(dim, positions(leaves, made))
        return tensor.contiguous()

    def between(self, leaves: Leaves, made: Tensor) -> Tensor:
        """What a value that has rows of the axis is cut with where a region reads it: their positions."""
        return positions(leaves, made)

    def cut(self, dim: int) -> Callable[..., Tensor]:
        """A value's rows, by what :meth:`between` gives."""
        return lambda outer, rows: outer.index_select(dim, rows)


@dataclass(frozen=True, eq=False)
class Merge(Static):
    """Rows that are weighted sums of the axis's rows.

    Attributes:
        by: makes a matrix ``(count, size)`` from the tensors of ``of``: what each new row of a weight is made of.
        outside: the same for values that a region reads of other nodes.
    """

    outside: Recipe | None = None

    @classmethod
    def matrices(cls, weights: Tensor, values: Tensor) -> Merge:
        """Both matrices ``(count, size)``, whatever the model's weights.

        Raises:
            ValueError: they differ in shape, or one is no matrix of finite numbers with a row.
        """
        if weights.dim() != 2 or weights.shape != values.shape or not len(weights):
            raise ValueError(
                f"two matrices (rows, of rows) of one shape are needed; got {weights.shape}, {values.shape}"
            )
        if not bool(torch.isfinite(weights).all() and torch.isfinite(values).all()):
            raise ValueError("a matrix has numbers that are not finite")

        def held(matrix: Tensor) -> Recipe:
            own = matrix.detach().double().cpu()
            return Recipe(("merge", tuple(own.shape), tuple(own.flatten().tolist())), lambda *_: (own,))

        return cls(len(weights), held(weights), outside=held(values))

    def of_tensor(self, tensor: Tensor, dims: Mapping[int, Leaves], made: Tensor) -> Tensor:
        dtype = torch.promote_types(tensor.dtype, torch.float32)  # merged in floats, and cast once
        matrix = placed(tensor, [made])[0].to(dtype)
        whole = tensor.to(dtype)
        for dim in dims:
            whole = torch.tensordot(matrix, whole, dims=([1], [dim])).movedim(0, dim)
        return whole.to(tensor.dtype).contiguous()

    def between(self, leaves: Leaves, made: Tensor) -> Tensor:
        return made

    def cut(self, dim: int) -> Callable[..., Tensor]:
        return lambda outer, matrix: torch.matmul(outer.movedim(dim, -1), matrix.to(outer.dtype).t()).movedim(-1, dim)


@dataclass(frozen=True, eq=False)
class Numbered(Static):
    """Rows of an axis that callers go on naming by their old numbers, and of which they go on seeing all: words.

    Attributes:
        places: makes ``(size,)`` int64, the row that each old number is now.
    """

    places: Recipe | None = None

    @classmethod
    def of_all(cls, rows: Sequence[int], size: int, fill: float, unknown: int | None = None) -> Numbered:
        """These of ``size`` rows.

        Args:
            unknown: the kept row that other numbers read; None for none, so that reading another is an error.
        """
        kept = Static.rows(rows)
        numbers = [int(r) for r in rows]
        missing = len(numbers) if unknown is None else numbers.index(unknown)  # behind the last row: an error

        def places(*_: Tensor) -> tuple[Tensor]:
            made = torch.full((size,), missing)
            made[numbers] = torch.arange(len(numbers))
            return (made,)

        recipe = Recipe(("places", kept.by.key, size, unknown), places)
        return cls(kept.count, kept.by, fill=fill, places=recipe)


@dataclass(frozen=True, eq=False)
class Picked(Static):
    """Rows that each call of the graph picks anew; how many is known, and weights are cut to them as the graph runs.

    Attributes:
        picked: the node that holds them, int64 ``(count,)``, ascending.
    """

    picked: fx.Node | None = None

    @classmethod
    def by_node(cls, node: fx.Node, fill: float | None = None) -> Picked:
        """The rows that a node holds."""
        recipe = Recipe(("picked",), _none_before_run_time)
        return cls(int(node.meta["val"].shape[0]), recipe, picked=node, fill=fill)


def _none_before_run_time(*_: Tensor) -> tuple[Tensor]:
    raise AssertionError("which rows are picked, only run time knows")


def kept_of(leaf: Leaf) -> int:
    """How many rows an axis has now."""
    if isinstance(leaf, int):
        return leaf
    if leaf[0] == CHOSEN:
        return int(leaf[2])
    lost = sum(before_of(leaves) - now_of(leaves) for _, _, leaves in leaf[2])
    return int(leaf[1]) - lost


def size_of(leaf: Leaf) -> int:
    """How many rows an axis had."""
    return leaf if isinstance(leaf, int) else int(leaf[1])


def now_of(leaves: Leaves) -> int:
    """The size of a dimension of these axes now."""
    return math.prod(map(kept_of, leaves))


def before_of(leaves: Leaves) -> int:
    """The size that it had."""
    return math.prod(map(size_of, leaves))


def positions(leaves: Leaves, chosen: Tensor) -> Tensor:
    """Ascending positions along a dimension that are kept.

    Args:
        chosen: the rows that are kept of the chosen axis.
    """
    grid = torch.arange(before_of(leaves), device=chosen.device).reshape([size_of(leaf) for leaf in leaves])
    for at, leaf in enumerate(leaves):
        if not isinstance(leaf, int):
            grid = grid.index_select(at, _rows(leaf, chosen))
    return grid.flatten()


def _rows(leaf: tuple[Any, ...], chosen: Tensor) -> Tensor:
    kind, size, *rest = leaf
    if kind == CHOSEN:
        return chosen
    (pieces,) = rest
    held = {start + step * i for start, step, leaves in pieces for i in range(before_of(leaves))}
    parts = [start + step * positions(leaves, chosen) for start, step, leaves in pieces]
    others = torch.tensor([i for i in range(size) if i not in held], dtype=torch.long, device=chosen.device)
    return torch.cat([others, *parts]).sort().values


def moved(leaves: Leaves, position: int) -> int | None:
    """Where a boundary along a dimension is now: how many kept rows precede it. None if that depends on which rows are kept."""
    if position in (0, before_of(leaves)):
        return 0 if position == 0 else now_of(leaves)
    first, *rest = leaves
    inner = before_of(tuple(rest))
    if position % inner:
        return None
    row = position // inner
    if isinstance(first, int):
        before: int | None = row
    elif first[0] == CHOSEN:
        before = None
    else:
        before = row
        for start, step, piece in first[2]:
            size = before_of(piece)
            if step != 1 or start < row < start + size:
                return None
            if before is not None and start + size <= row:
                before -= size - now_of(piece)
    return None if before is None else before * now_of(tuple(rest))


def interleaved(leaves: Leaves) -> bool:
    """Whether every so many-th row of a dimension is of one piece, and all pieces lose the same rows."""
    if len(leaves) != 1 or isinstance(leaves[0], int) or leaves[0][0] != PIECES:
        return False
    pieces = leaves[0][2]
    steps = {step for _, step, _ in pieces}
    alike = len({piece for *_, piece in pieces}) == 1
    return alike and len(steps) == 1 and len(pieces) == next(iter(steps))


def by_rows(leaves: Leaves, tensor: Tensor, dim: int) -> Tensor:
    """``(size, n)``: what a tensor holds for each row of the chosen axis, which dimension ``dim`` has once or in pieces."""
    found = [t.movedim(at, 0).flatten(1) for t, at in _occurrences(leaves, tensor, dim)]
    return torch.cat(found, 1)


def _occurrences(leaves: Leaves, tensor: Tensor, dim: int) -> list[tuple[Tensor, int]]:
    """Views of the tensor in which the chosen axis is a dimension, and which."""
    found = []
    split = tensor.unflatten(dim, [size_of(leaf) for leaf in leaves])
    for at, leaf in enumerate(leaves, dim):
        if isinstance(leaf, int):
            continue
        if leaf[0] == CHOSEN:
            found.append((split.unsqueeze(-1), at))
        else:
            for start, step, piece in leaf[2]:
                end = start + step * (before_of(piece) - 1) + 1
                rows: Callable[..., Any] = split.movedim(at, 0).__getitem__
                found += _occurrences(piece, rows(slice(start, end, step)).movedim(0, at), at)
    return found
