"""Axes as factors of dimensions: union-find over axes that reshapes split and merge.

A dimension is a tuple of factors, outermost first: the last one of ``(B, T, H * D)`` is ``(H, D)``, and one of size 1
that no value varies along is ``()``. Sizes only ever *refuse* here: two factors become one axis because an operator
walks them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from accelpass.ir.core.graph import known


class Factor:
    """One axis, until it turns out to be another one (``same``) or a product (``split``)."""

    __slots__ = ("made", "same", "size", "split")

    def __init__(self, size: Any, made: str) -> None:
        self.size = size
        self.made = made
        self.same: Factor | None = None
        self.split: tuple[Factor, Factor] | None = None


Factors = tuple[Factor, ...]


def find(factor: Factor) -> Factor:
    """What stands for all factors that are one axis."""
    while factor.same is not None:
        if factor.same.same is not None:
            factor.same = factor.same.same
        factor = factor.same
    return factor


def leaves(factors: Iterable[Factor]) -> Factors:
    """The factors as they are known now: representatives, products taken apart."""
    found: list[Factor] = []
    for factor in factors:
        factor = find(factor)
        found += leaves(factor.split) if factor.split else (factor,)
    return tuple(found)


def same_size(a: Any, b: Any) -> bool:
    """Equal for all sizes that the graph may run at."""
    return known(a == b)


def split(factor: Factor, outer: Any, inner: Any) -> Factors:
    """Take a leaf apart; every dimension that has it has the two parts from now on."""
    factor.split = Factor(outer, factor.made), Factor(inner, factor.made)
    return factor.split


def unify(a: Iterable[Factor], b: Iterable[Factor]) -> bool:
    """Two dimensions are walked together: their factors are the same axes.

    Returns:
        False if the factors of one are no refinement of the other's; outer ones that agree are unified all the same.
    """
    left, right = list(leaves(a)), list(leaves(b))
    if len(left) == len(right) == 1:
        if known(left[0].size != right[0].size):
            return False
        _join(left[0], right[0])  # symbols that no guard made equal are equal here all the same
        return True
    while left and right and left[0] is right[0]:
        del left[0], right[0]
    while left and right and left[-1] is right[-1]:
        del left[-1], right[-1]
    if set(left) & set(right):  # the same factors in another order: interleaved pairs beside halves
        return False
    while left and right:
        x, y = left[0], right[0]
        if same_size(x.size, y.size):
            _join(x, y)
            del left[0], right[0]
        elif known(x.size == 1):
            del left[0]
        elif known(y.size == 1):
            del right[0]
        else:
            larger, smaller = (left, right) if _less(y.size, x.size) else (right, left)
            inner = divided(larger[0].size, smaller[0].size)
            if inner is None:
                return False
            larger[:1] = split(larger[0], smaller[0].size, inner)
        left, right = list(leaves(left)), list(leaves(right))
    return True


def _join(a: Factor, b: Factor) -> None:
    if a is not b:
        b.same = a


def reshape(dims: Sequence[Factors], sizes: Sequence[Any], made: str) -> list[Factors]:
    """The factors of each dimension after a reshape to ``sizes``.

    Dimensions are matched in the smallest groups of equal product, and each group factor by factor. A group that is not
    a product of common factors (12 read as 4 x 3 where it was 3 x 4) gets new factors.
    """
    pending = list(leaves(f for dim in dims for f in dim))
    out: list[Factors] = []
    at = 0
    while at < len(sizes):
        if known(sizes[at] == 1):
            out.append((pending.pop(0),) if pending and known(pending[0].size == 1) else ())
            at += 1
            continue
        count, end = _group(pending, sizes, at)
        group, pending = pending[:count], pending[count:]
        wanted = sizes[at:end]
        out += _aligned(group, wanted) or [fresh(size, made) for size in wanted]
        at = end
        if out[-1]:
            # Factors of size 1 belong to a dimension of size 1 that follows, or else to the one before.
            follow = 0
            while at + follow < len(sizes) and known(sizes[at + follow] == 1):
                follow += 1
            ones = 0
            while ones < len(pending) and known(pending[ones].size == 1):
                ones += 1
            extra = max(0, ones - follow)
            out[-1], pending = (*out[-1], *pending[:extra]), pending[extra:]
    return out


def fresh(size: Any, made: str) -> Factors:
    """A new axis; none for a dimension of size 1."""
    return () if known(size == 1) else (Factor(size, made),)


def _group(pending: Sequence[Factor], sizes: Sequence[Any], at: int) -> tuple[int, int]:
    """How many factors, and up to which size, make the next equal products; everything left if none do."""
    have, want, count, end = 1, sizes[at], 0, at + 1
    while not same_size(have, want) or count == 0:
        if count < len(pending) and (_less(have, want) or end == len(sizes)):
            have, count = have * pending[count].size, count + 1
        elif end < len(sizes):
            want, end = want * sizes[end], end + 1
        else:
            return len(pending), len(sizes)
    return count, end


def _aligned(group: Sequence[Factor], sizes: Sequence[Any]) -> list[Factors] | None:
    """The group's factors dealt out to ``sizes``, splitting where a size ends inside a factor."""
    pending, out = list(group), []
    for size in sizes:
        taken: list[Factor] = []
        left = size  # what the factors yet to be taken must multiply to
        while not known(left == 1) or (pending and known(pending[0].size == 1) and not taken):
            if not pending:
                return None
            first = pending.pop(0)
            if (rest := divided(left, first.size)) is not None:
                taken.append(first)
                left = rest
            elif (inner := divided(first.size, left)) is not None:
                outer, remaining = split(first, left, inner)
                taken.append(outer)
                pending.insert(0, remaining)
                left = 1
            else:
                return None
        out.append(tuple(taken))
    if out and pending:
        if not all(known(f.size == 1) for f in pending):
            return None
        out[-1] += tuple(pending)
    return out


def divided(a: Any, b: Any) -> Any:
    """a / b if that is known to be whole, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if same_size(a, b):
        return 1
    quotient = a // b
    return quotient if same_size(quotient * b, a) else None


def _less(a: Any, b: Any) -> bool:
    """a < b at the sizes that the graph was traced with: it picks which side to read on, equality decides."""
    a, b = (s.node.hint if isinstance(s, torch.SymInt) else s for s in (a, b))
    return a is not None and b is not None and a < b
