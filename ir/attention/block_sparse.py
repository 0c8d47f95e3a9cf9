"""Block-sparse attention: each block of queries reads the blocks of keys that are listed for it, and no others.

The format is that of FlexAttention's block mask (Dong et al., 2024, arXiv 2412.05496), in which the block-sparse
methods of the literature can all be written: indices of key blocks and how many of them are valid. `reach` and `causal`
cut inside the listed blocks, so a band needs no mask either.

The op's body is the CPU's kernel, and runs on any device; `KERNELS` has what other devices use instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from accelpass.ir.attention.spec import BlockList
from accelpass.ir.graph import aten

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, float], tuple[Tensor, Tensor]]
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


def check_block_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, size: int, reach: int) -> None:
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
    q_blocks = -(-q.shape[2] // size)
    if blocks.dim() != 3 or blocks.shape[0] not in (1, q.shape[1]) or blocks.shape[1] != q_blocks:
        raise ValueError(
            f"{name}: blocks is {tuple(blocks.shape)}; {q.shape[1]} heads of {q.shape[2]} queries in blocks of {size} "
            f"need (1 or {q.shape[1]}, {q_blocks}, most)"
        )
    if counts.shape != blocks.shape[:2]:
        raise ValueError(f"{name}: counts is {tuple(counts.shape)} and blocks {tuple(blocks.shape)}")
    devices = {str(t.device) for t in (q, k, v, blocks, counts)}
    if len(devices) > 1:
        raise ValueError(f"{name}: operands are on {', '.join(sorted(devices))}; move them to one device")


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
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks of keys. There is no backward.

    Args:
        q: ``(B, Hq, N, d)``.
        k: ``(B, Hkv, M, d)``; Hkv divides Hq.
        v: ``(B, Hkv, M, dv)``.
        blocks: int32 ``(1 or Hq, q_blocks, most)``: for each query block the key blocks that it reads, ascending.
        counts: int32 ``(1 or Hq, q_blocks)``: how many of these are valid; the others are not looked at.
        size: tokens of a block; the last block of queries and of keys may be shorter.
        reach: query i reads no key j with ``|i - j| > reach``, listed or not; -1 for no such limit.
        causal: query i reads no key j > i (sdpa's ``is_causal``, whatever N and M are).
        scale: of the scores.

    Returns:
        The output ``(B, Hq, N, dv)``, in memory ``(B, N, Hq, dv)``, and the natural log-sum-exp of the scaled scores, float32 ``(B, Hq, N)``. A row
        without any key has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: as ``check_block_sparse``; a list is not of this many keys, or is not ascending.
    """
    check_block_sparse(q, k, v, blocks, counts, size, reach)
    heads, rows = q.shape[1], q.shape[2]
    groups, columns, width = heads // k.shape[1], k.shape[2], v.shape[3]
    reach = effective_reach(reach, rows, columns)
    out, lse = empty_results(q, v)
    widest = max(q.shape[3], width)  # the fused kernel has one width; channels of zeros change nothing
    q, k, v = (_widened(t, widest) for t in (q, k, v))
    tables = _checked(blocks.tolist(), counts.tolist(), -(-columns // size))
    if all(table == tables[0] for table in tables):
        shared = [(slice(0, heads), slice(0, k.shape[1]), groups, tables[0])]
    else:
        shared = [(slice(h, h + 1), slice(h // groups, h // groups + 1), 1, t) for h, t in enumerate(tables)]
    masks = _Masks(q, reach, causal)
    for mine, theirs, folded, table in shared:
        for low, high, runs in _pieces(table, size, rows, columns, reach, causal):
            if not runs:
                out[:, mine, low:high], lse[:, mine, low:high] = 0.0, -torch.inf
                continue
            keys, values = (_taken(t[:, theirs], runs) for t in (k, v))
            # Query heads of one key head as more rows, which are one matrix product.
            queries = q[:, mine, low:high].reshape(q.shape[0], -1, folded * (high - low), widest)
            mask, empty = masks(low, high, runs)
            if mask is not None and folded > 1:
                mask = mask.repeat(folded, 1)
            made, logs = _dense(queries, keys, values, mask, scale)
            logs = logs.reshape(q.shape[0], -1, high - low)
            out[:, mine, low:high] = made[..., :width].reshape(*logs.shape, width)
            lse[:, mine, low:high] = logs if empty is None else logs.masked_fill(empty, -torch.inf)
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
) -> tuple[Tensor, Tensor]:
    check_block_sparse(q, k, v, blocks, counts, size, reach)
    return empty_results(q, v)


def effective_reach(reach: int, rows: int, columns: int) -> int:
    """The same reach, or -1 where it lets every key through."""
    return -1 if reach >= max(rows, columns) - 1 else reach


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, as torch's fused kernels lay it out, and the log-sum-exp, to be filled."""
    batch, heads, rows = q.shape[:3]
    out = v.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


def _widened(x: Tensor, width: int) -> Tensor:
    if x.shape[-1] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked(blocks: list[list[list[int]]], counts: list[list[int]], k_blocks: int) -> list[list[list[int]]]:
    """For each head, for each query block, the valid entries."""
    tables = []
    for rows, valid in zip(blocks, counts, strict=True):
        table = [row[: max(0, count)] for row, count in zip(rows, valid, strict=True)]
        for at, (row, count) in enumerate(zip(table, valid, strict=True)):
            ascending = all(a < b for a, b in pairwise(row))
            if len(row) != count or not ascending or (row and not 0 <= row[0] <= row[-1] < k_blocks):
                raise ValueError(
                    f"block_sparse_attention: query block {at} lists {row} and counts {count}; "
                    f"it must list that many of {k_blocks} key blocks, ascending"
                )
        tables.append(table)
    return tables


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


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one piece with its log-sum-exp; what a row without keys gets there does not matter."""
    return (_fused if q.device.type == "cpu" else _composed)(q, k, v, mask, scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """torch's kernel. Against products and a softmax over one scratch: as fast on long runs, faster on short ones."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse.float()


def _composed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.mT).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return torch.matmul(weights.to(v.dtype), v), lse


BLOCK_SPARSE = torch.ops.accelpass.block_sparse_attention.default
