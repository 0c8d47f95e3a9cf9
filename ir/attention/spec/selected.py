"""How many (query, key) pairs a selection leaves, without the mask."""

from __future__ import annotations

from functools import lru_cache

from accelpass.ir.attention.spec.spec import All, Band, BlockList, Select, SinksAndWindow


@lru_cache(maxsize=256)
def selected_pairs(select: Select, heads: int, rows: int, columns: int, causal: bool = False) -> int | None:
    """The pairs of all heads of one sequence that ``select`` lets through, without those that ``causal`` cuts off.

    Returns:
        What ``op.selection`` and the causal cut leave, exactly; None for a selection that is not known here.
    """
    if isinstance(select, All):
        each = sum(_end(i, columns, causal) for i in range(rows))
    elif isinstance(select, Band):
        each = sum(
            max(0, _end(i, min(columns, i + select.reach + 1), causal) - max(0, i - select.reach)) for i in range(rows)
        )
    elif isinstance(select, SinksAndWindow):
        offset = 0 if causal else columns - rows
        each = 0
        for i in range(rows):
            end = _end(i, columns, causal)
            start = max(0, i + offset - select.window + 1)
            each += min(end, select.sinks) + max(0, end - max(start, select.sinks))
    elif isinstance(select, BlockList):
        of_heads = select.blocks if select.per_head else (select.blocks,) * heads
        return sum(_listed(pairs, select.size, rows, columns, causal) for pairs in of_heads)
    else:
        return select.pairs(heads, rows, columns, causal)
    return heads * each


@lru_cache(maxsize=64)
def _listed(pairs: tuple[tuple[int, int], ...], size: int, rows: int, columns: int, causal: bool) -> int:
    found = 0
    for i, j in set(pairs):
        queries = range(i * size, min((i + 1) * size, rows))
        first, end = j * size, min((j + 1) * size, columns)
        if not causal or end - 1 <= queries.start:
            found += len(queries) * max(0, end - first)
        elif first < queries.stop:
            found += sum(max(0, _end(row, end, causal) - first) for row in queries)
    return found


def _end(query: int, end: int, causal: bool) -> int:
    return min(end, query + 1) if causal else end
