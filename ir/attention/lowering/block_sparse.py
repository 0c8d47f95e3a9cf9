"""Block-sparse attention: each block of queries reads the blocks of keys that are listed for it, and no others.

The format is that of FlexAttention's block mask (Dong et al., 2024, arXiv 2412.05496), in which the block-sparse
methods of the literature can all be written: indices of key blocks and how many of them are valid. `reach` and `causal`
cut inside the listed blocks, so a band needs no mask either. With an `order`, blocks are of reordered keys (Wang et al.,
2025, arXiv 2510.21270): attention does not depend on the order of its keys, and sorted keys need fewer blocks.

The op's body is the CPU's kernel, and runs on any device; `KERNELS` has what other devices use instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.stacked import dense, stacked
from accelpass.ir.attention.spec.spec import BlockList
from accelpass.ir.core.graph import known

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, float, Tensor | None], tuple[Tensor, Tensor]]
KERNELS: dict[str, Kernel] = {}
"""By device type: what computes ``block_sparse_attention`` in a graph for that device, with its signature."""

Run = tuple[int, int]  # of keys, without the second


def cpu_rows(reach: int) -> int:
    """Query rows that the CPU form takes at a time, and the best block of a band there.

    More rows make better matrix products, and waste more on the two edges of a band: measured at 16 heads of 72.
    """
    return 64 if 0 <= reach < 512 else 192


def band_blocks(n: int, m: int, reach: int, size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tables of the blocks of ``size`` tokens that ``|i - j| <= reach`` touches, for n queries and m keys.

    Returns:
        ``blocks`` int32 ``(1, q_blocks, most)`` and ``counts`` int32 ``(1, q_blocks)``. Made by arithmetic on the
        device, so that a traced graph copies nothing to it.
    """
    if size < 1 or reach < 0:
        raise ValueError(f"band_blocks: size={size}, reach={reach}; need size >= 1 and reach >= 0")
    reach = min(reach, max(n, m))  # what is further away does not exist
    low = torch.arange(0, n, size, dtype=torch.int32, device=device)
    # Divided first, then clamped: Inductor (torch 2.13) fails on the quotient of a clamped position, whose range it
    # looks for in the wrong place ("vr must not be None").
    first = ((low - reach) // size).clamp_min(0)
    last = ((low + (size - 1 + reach)) // size).clamp_max(min(n - 1 + reach, m - 1) // size)
    counts = torch.where(low - reach < m, last - first + 1, 0)
    most = min(-(-m // size), 1 + 2 * -(-reach // size))
    blocks = first.unsqueeze(-1) + torch.arange(most, dtype=torch.int32, device=device)
    return blocks.clamp_max(max(0, -(-m // size) - 1)).unsqueeze(0), counts.unsqueeze(0)


def listed_blocks(select: BlockList, n: int, m: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The tables of a block list, ``(heads, q_blocks, most)`` and ``(heads, q_blocks)``; heads is 1 unless per head.

    Raises:
        ValueError: a pair names a block that n queries or m keys do not have.
    """
    q_blocks, k_blocks = -(-n // select.size), -(-m // select.size)
    tables: list[list[list[int]]] = []
    for pairs in select.blocks if select.per_head else (select.blocks,):
        rows: list[list[int]] = [[] for _ in range(q_blocks)]
        for i, j in sorted({(int(i), int(j)) for i, j in pairs}):
            if not (0 <= i < q_blocks and 0 <= j < k_blocks):
                raise ValueError(f"block ({i}, {j}) is not one of {q_blocks} query blocks and {k_blocks} key blocks")
            rows[i].append(j)
        tables.append(rows)
    most = max((len(row) for rows in tables for row in rows), default=0)
    padded = [[row + [0] * (most - len(row)) for row in rows] for rows in tables]
    blocks = torch.tensor(padded, dtype=torch.int32).reshape(len(tables), q_blocks, most)
    counts = torch.tensor([[len(row) for row in rows] for rows in tables], dtype=torch.int32)
    return blocks.to(device), counts.reshape(len(tables), q_blocks).to(device)


def check_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    order: Tensor | None = None,
) -> None:
    """Check what ``block_sparse_attention`` needs.

    Raises:
        TypeError: a dtype is not what is computed or listed.
        ValueError: a shape, device or number does not fit.
    """
    name = "block_sparse_attention"
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"{name}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one float dtype")
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise TypeError(f"{name}: blocks and counts are {blocks.dtype} and {counts.dtype}; they must be torch.int32")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{name}: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; they need 4")
    shown = f"q is {tuple(q.shape)}, k is {tuple(k.shape)}, v is {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{name}: {shown}; they must be (B, Hq, N, d), (B, Hkv, M, d), (B, Hkv, M, dv)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{name}: {shown}; k's heads must divide q's")
    if size < 1 or reach < -1:
        raise ValueError(f"{name}: size={size}, reach={reach}; need size >= 1 and reach >= 0, or -1 for none")
    q_blocks, heads = -(-q.shape[2] // size), q.shape[1]
    tables = (1, heads, q.shape[0] * heads)
    if blocks.dim() != 3 or blocks.shape[0] not in tables or blocks.shape[1] != q_blocks:
        raise ValueError(
            f"{name}: blocks is {tuple(blocks.shape)}; {q.shape[0]} x {heads} heads of {q.shape[2]} queries in blocks of "
            f"{size} need ({_either(tables)}, {q_blocks}, most)"
        )
    if counts.shape != blocks.shape[:2]:
        raise ValueError(f"{name}: counts is {tuple(counts.shape)} and blocks {tuple(blocks.shape)}")
    if order is not None:
        if order.dtype != torch.int32:
            raise TypeError(f"{name}: order is {order.dtype}; it must be torch.int32")
        if order.dim() != 2 or order.shape[0] not in tables or order.shape[1] < k.shape[2]:
            raise ValueError(
                f"{name}: order is {tuple(order.shape)}; {k.shape[2]} keys need ({_either(tables)}, {k.shape[2]}), "
                "or more places with -1 at those that hold none"
            )
    devices = {str(t.device) for t in (q, k, v, blocks, counts, order) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: operands are on {', '.join(sorted(devices))}; move them to one device")


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(dict.fromkeys(map(str, numbers)))


@torch.library.custom_op("accelpass::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    causal: bool,
    scale: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks of keys. There is no backward.

    Args:
        q: ``(B, Hq, N, d)``.
        k: ``(B, Hkv, M, d)``; Hkv divides Hq.
        v: ``(B, Hkv, M, dv)``.
        blocks: int32 ``(tables, q_blocks, most)``: for each query block the key blocks that it reads, ascending. One
            table serves all heads, Hq are of one sequence's heads, B * Hq of each sequence's own.
        counts: int32 ``(tables, q_blocks)``: how many of these are valid; the others are not looked at.
        size: tokens of a block; the last block of queries and of keys may be shorter.
        reach: query i reads no key j with ``|i - j| > reach``, listed or not; -1 for no such limit.
        causal: query i reads no key j > i (sdpa's ``is_causal``, whatever N and M are).
        scale: of the scores.
        order: int32 ``(1, Hq or B * Hq, places)``: key block b holds the tokens ``order[b * size : (b + 1) * size]``; each row
            has all tokens once, and -1 at further places, which hold none. ``reach`` and ``causal`` go by token. None
            where keys stand in their own order.

    Returns:
        The output ``(B, Hq, N, dv)``, in memory ``(B, N, Hq, dv)``, and the natural log-sum-exp of the scaled scores,
        float32 ``(B, Hq, N)``. A row without any key has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: as ``check_block_sparse``; a list is not of this many keys, or is not ascending; an order
            misses a token.
    """
    check_block_sparse(q, k, v, blocks, counts, size, reach, order)
    rows, columns, width = q.shape[2], k.shape[2], v.shape[3]
    reach = effective_reach(reach, rows, columns)
    blocks = _checked(blocks, counts, -(-(columns if order is None else order.shape[1]) // size))
    if order is not None and not _is_order(order, columns):
        raise ValueError(f"block_sparse_attention: order does not name each of the {columns} tokens once")
    out, lse = empty_results(q, v)
    if not lse.numel():
        return out, lse
    widest = max(q.shape[3], width)  # the fused kernel has one width; channels of zeros change nothing
    q, k, v = (_widened(t, widest) for t in (q, k, v))
    if order is not None or not ((blocks == blocks[:1]).all() and (counts == counts[:1]).all()):
        made, logs = stacked(q, k, v, blocks, counts, size, reach, causal, scale, order)
        out.copy_(made[..., :width])
        lse.copy_(logs)
        return out, lse
    folded, masks = q.shape[1] // k.shape[1], _Masks(q, reach, causal)
    table = [row[:count] for row, count in zip(blocks[0].tolist(), counts[0].tolist(), strict=True)]
    for low, high, runs in _pieces(table, size, rows, columns, reach, causal):
        if not runs:
            out[:, :, low:high], lse[:, :, low:high] = 0.0, -torch.inf
            continue
        keys, values = (_taken(t, runs) for t in (k, v))
        # Query heads of one key head as more rows, which are one matrix product.
        queries = q[:, :, low:high].reshape(q.shape[0], -1, folded * (high - low), widest)
        mask, empty = masks(low, high, runs)
        if mask is not None and folded > 1:
            mask = mask.repeat(folded, 1)
        made, logs = dense(queries, keys, values, mask, scale)
        logs = logs.reshape(q.shape[0], -1, high - low)
        out[:, :, low:high] = made[..., :width].reshape(*logs.shape, width)
        lse[:, :, low:high] = logs if empty is None else logs.masked_fill(empty, -torch.inf)
    return out, lse


@block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    causal: bool,
    scale: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_block_sparse(q, k, v, blocks, counts, size, reach, order)
    return empty_results(q, v)


def effective_reach(reach: int, rows: int, columns: int) -> int:
    """The same reach, or -1 where it lets every key through."""
    return -1 if reach < 0 or (known(reach >= rows - 1) and known(reach >= columns - 1)) else reach


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, as torch's fused kernels lay it out, and the log-sum-exp, to be filled."""
    batch, heads, rows = q.shape[:3]
    out = v.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


def _widened(x: Tensor, width: int) -> Tensor:
    if x.shape[-1] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked(blocks: Tensor, counts: Tensor, k_blocks: int) -> Tensor:
    """The lists with zeros for what is not to be looked at.

    Raises:
        ValueError: a list is longer than its table, not ascending, or names a block that does not exist.
    """
    most = blocks.shape[2]
    valid = torch.arange(most, device=blocks.device) < counts.unsqueeze(-1)
    wrong = (counts < 0) | (counts > most) | (valid & ((blocks < 0) | (blocks >= k_blocks))).any(-1)
    wrong |= (valid[..., 1:] & (blocks[..., 1:] <= blocks[..., :-1])).any(-1)
    if wrong.any():
        table, at = wrong.nonzero()[0].tolist()
        count = int(counts[table, at])
        raise ValueError(
            f"block_sparse_attention: query block {at} lists {blocks[table, at, : max(0, count)].tolist()} and counts "
            f"{count}; it must list that many of {k_blocks} key blocks, ascending"
        )
    return blocks.masked_fill(valid.logical_not(), 0)


def _is_order(order: Tensor, tokens: int) -> bool:
    """Whether each row has each token once, and -1 everywhere else."""
    at = torch.where((order < 0) | (order >= tokens), tokens, order.long())
    found = torch.zeros(len(order), tokens + 1, dtype=torch.bool, device=order.device).scatter(1, at, True)
    return bool(found[:, :tokens].all() and ((order == -1).sum(1) == order.shape[1] - tokens).all())


def _pieces(
    table: Sequence[list[int]], size: int, rows: int, columns: int, reach: int, causal: bool
) -> Iterator[tuple[int, int, list[Run]]]:
    """Ranges of queries and the runs of keys that each reads. Neighbouring query blocks with equal lists are one range;
    a range whose keys depend on the query is cut, so that each part reads few keys that most of its queries do not."""
    limited = reach >= 0 or causal
    first = 0
    for at in range(len(table)):
        if at + 1 < len(table) and table[at + 1] == table[first]:
            continue
        start, stop = first * size, min((at + 1) * size, rows)
        runs = _runs(table[first], size, columns)
        first = at + 1
        step = cpu_rows(reach) if limited else stop - start
        for low in range(start, stop, step):
            high = min(low + step, stop)
            seen_from = max(0, low - reach) if reach >= 0 else 0
            seen_to = min(columns if reach < 0 else high + reach, high if causal else columns)
            cut = [(max(a, seen_from), min(b, seen_to)) for a, b in runs]
            yield low, high, [(a, b) for a, b in cut if a < b]


def _runs(listed: Sequence[int], size: int, columns: int) -> list[Run]:
    runs: list[Run] = []
    for block in listed:
        start, stop = block * size, min((block + 1) * size, columns)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def _taken(x: Tensor, runs: Sequence[Run]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class _Masks:
    """What `reach` and `causal` cut off one piece, as an additive mask, and its rows without keys; None for nothing.

    The mask of a piece depends on where its keys are relative to its queries. Inside a band that is the same in every
    piece, so the last mask is kept; only the last, since all of them may be as large as all scores.
    """

    def __init__(self, like: Tensor, reach: int, causal: bool) -> None:
        self.like, self.reach, self.causal = like, reach, causal
        self.at: tuple[int, tuple[Run, ...]] | None = None
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, low: int, high: int, runs: Sequence[Run]) -> tuple[Tensor | None, Tensor | None]:
        at = high - low, tuple((start - low, stop - low) for start, stop in runs)
        if at != self.at:
            self.at, self.last = at, self._made(*at)
        return self.last

    def _made(self, rows: int, runs: Sequence[Run]) -> tuple[Tensor | None, Tensor | None]:
        nearest, furthest = runs[0][0], runs[-1][1] - 1
        beyond = self.reach >= 0 and (nearest < rows - 1 - self.reach or furthest > self.reach)
        if not beyond and not (self.causal and furthest > 0):
            return None, None
        device = self.like.device
        query = torch.arange(rows, device=device).unsqueeze(-1)
        key = torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])
        hidden = (query - key).abs() > self.reach if self.reach >= 0 else query < key
        if self.causal and self.reach >= 0:
            hidden |= query < key
        empty = hidden.all(-1)
        mask = self.like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return mask, empty if bool(empty.any()) else None


BLOCK_SPARSE = torch.ops.accelpass.block_sparse_attention.default
