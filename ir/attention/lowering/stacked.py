"""Block-sparse attention whose heads have lists of their own, on the CPU: pieces of equal length are one batch.

A head's block of queries is too little work for all cores, and a loop over heads and blocks is mostly overhead. So
pieces that read equally many keys are stacked over all heads, their keys gathered, and given to torch's kernel at once.
Neighbouring blocks of queries mostly read the same keys: what all of them read is computed for all of them, as the
kernel is faster on more rows. Queries that read their own stretch of tokens up to themselves are given to the kernel in
the tokens' own order, in which causality needs no mask and half of the work. Other blocks of which queries see a part are
computed apart, so that only they pay for a mask. The parts are merged by their log-sum-exp (Dao et al., 2022, arXiv
2205.14135).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.attention.spec.block_select import grid_of
from accelpass.ir.core.graph import aten

_TOGETHER = (8, 2, 1)
"""How many neighbouring blocks of queries are one piece, largest first: of blocks of 128, the kernel's steps in speed."""
_KEYS = 32768
"""Keys that one batch gathers. Fewer stay in a cache, a tenth faster on one core; more are fewer waits of cores for each
other, which cost far more where other work runs beside."""
_NOWHERE = 1 << 30  # a token after all others


def stacked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    causal: bool,
    scale: float,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``block_sparse_attention``, for values as wide as keys; entries of lists that are not valid are 0."""
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    device, q_blocks = q.device, -(-blocks.shape[1] // _TOGETHER[0]) * _TOGETHER[0]
    pair = torch.arange(batch * heads, device=device)
    tokens = _tokens(order, columns, size, device)
    # Where keys stand in their own order, a block is one row of the memory that is gathered from: a copy of kilobytes.
    unit = size if order is None else 1
    units = tokens.shape[1] if order is None else columns
    begin = (torch.arange(q_blocks, device=device, dtype=torch.int32) * size).unsqueeze(-1)
    listed = grid_of(blocks, counts, q_blocks, tokens.shape[1])[pair % len(blocks)]
    placed = tokens[pair % len(tokens)]
    whole, cut = _parts(listed, placed, begin, rows, reach, causal)
    queries = _padded(q, q_blocks * size).reshape(-1, width)
    keys, values = (_padded(t, units * unit).reshape(-1, unit * width) for t in (k, v))
    start = (pair // heads * kv_heads + pair % heads // (heads // kv_heads)) * units
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # parts are added: rounded once
    out = torch.zeros(len(queries), width, dtype=wide, device=device)
    lse = torch.full((len(queries), 1), -torch.inf, device=device)
    room = [q.new_empty(0), q.new_empty(0)]  # fresh memory for each batch would cost as much as filling it

    def attend(at: Tensor, together: int, read: Tensor, token: Tensor | None = None, square: bool = False) -> None:
        """Attend over the units ``read (pieces, units)`` from these of all pieces of ``together`` query blocks each.

        Args:
            token: ``(pieces, keys)``, the tokens that these are, where queries see a part of them.
        """
        asked, found, logs = (t.view(-1, together * size, t.shape[1]) for t in (queries, out, lse))
        many = q_blocks // together
        held = (start[at // many].unsqueeze(-1) + read).flatten()
        if len(held) > len(room[0]):
            room[:] = [q.new_empty(len(held), unit * width) for _ in room]
        near, far = (
            torch.index_select(t, 0, held, out=r[: len(held)]).view(len(at), 1, -1, width)
            for t, r in zip((keys, values), room, strict=True)
        )
        mask = empty = None
        if token is not None:
            query = (begin[at % many] + begin.new_tensor(range(size))).unsqueeze(-1)
            mask, empty = _mask(query, token.unsqueeze(1), reach, causal, q.dtype)
            mask = mask.unsqueeze(1)
        made, log = dense(asked.index_select(0, at).unsqueeze(1), near, far, mask, scale, square)
        made, log = made.squeeze(1).to(wide), log.squeeze(1).unsqueeze(-1)
        if empty is not None and bool(empty.any()):
            made, log = made.masked_fill(empty, 0.0), log.masked_fill(empty, -torch.inf)
        first = together == _TOGETHER[0] and not square  # there is nothing yet to merge with
        if not first:
            made, log = _merged(found.index_select(0, at), logs.index_select(0, at), made, log)
        found.index_copy_(0, at, made)
        logs.index_copy_(0, at, log)

    def add(part: Tensor, together: int, cuts: bool) -> None:
        """Attend over the key blocks ``(pairs, pieces, k_blocks)`` of ``together`` query blocks each."""
        number = part.sum(-1).flatten()
        chosen = torch.where(part, torch.arange(part.shape[2], device=device), part.shape[2]).sort(-1).values
        chosen = chosen.flatten(0, 1)
        for count in number.unique().tolist():
            if not count:
                continue
            for at in (number == count).nonzero().flatten().split(max(1, _KEYS // (count * size))):
                read, token = chosen[at, :count], None
                if cuts or unit == 1:
                    token = tokens[at.unsqueeze(-1) // part.shape[1] % len(tokens), read].flatten(1)
                    read = read if unit > 1 else token.clamp_max(columns - 1)
                attend(at, together, read, token if cuts else None)

    squares, own = torch.zeros(len(pair), 1), _own_blocks(cut)
    if causal and rows == columns and not 0 <= reach < own * size - 1:
        squares = _taken_squares(listed, whole, cut, placed, own, rows // (own * size))
    for together in _TOGETHER:
        each = whole.unflatten(1, (-1, together))
        common = each.all(2)
        add(common, together, False)
        whole = (each & common.unsqueeze(2).logical_not()).flatten(1, 2)
    own_places = squares.flatten().nonzero().flatten()
    if len(own_places):
        stretch = torch.arange(own * size // unit, device=device)
        for at in own_places.split(max(1, _KEYS // (own * size))):
            attend(at, own, (at % squares.shape[1] * len(stretch)).unsqueeze(-1) + stretch, square=True)
    add(cut, 1, True)
    out, lse = (t.view(batch, heads, -1, t.shape[1])[:, :, :rows] for t in (out, lse))
    return out, lse.squeeze(-1)


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - x.shape[2])) if rows > x.shape[2] else x


def _own_blocks(cut: Tensor) -> int:
    """How many neighbouring query blocks share the tokens of the blocks that are cut, going by the most that are."""
    most = max(1, int(cut.sum(-1).max()) if cut.numel() else 1)
    return int(min(_TOGETHER[0], 1 << (most.bit_length() - 1)))


def _taken_squares(listed: Tensor, whole: Tensor, cut: Tensor, placed: Tensor, own: int, full: int) -> Tensor:
    """Stretches of ``own`` query blocks that read all of their own tokens that they may see, in whatever order these are.

    Args:
        listed, whole, cut: ``(pairs, q_blocks, k_blocks)``; what the stretches read of themselves is taken out of the
            last two.
        placed: the token at each place, ``(pairs, k_blocks, size)``.
        full: how many whole stretches there are tokens for.

    Returns:
        Boolean ``(pairs, q_blocks / own)``.
    """
    size, span = placed.shape[2], placed.shape[2] * own
    pairs, q_blocks = listed.shape[:2]
    first, last = (
        t[:, : full * own].unflatten(1, (full, own)) for t in (placed.amin(-1), placed.amax(-1))
    )  # (pairs, stretches, blocks)
    low = torch.arange(full, device=listed.device).unsqueeze(-1) * span
    is_own = ((first >= low) & (last < low + span)).all(-1)
    end = low + torch.arange(1, own + 1, device=listed.device) * size - 1

    def inner(grid: Tensor) -> Tensor:
        """What stretches read of themselves, a view ``(pairs, stretches, q_blocks, k_blocks)``."""
        here = grid[:, : full * own, : full * own].view(pairs, full, own, full, own)
        return here.diagonal(dim1=1, dim2=3).movedim(-1, 1)

    needed = first.unsqueeze(2) <= end.unsqueeze(-1)
    is_own = is_own & (inner(listed) | needed.logical_not()).flatten(2).all(-1)
    for grid in (whole, cut):
        inner(grid).masked_fill_(is_own[..., None, None], False)
    return F.pad(is_own, (0, q_blocks // own - full))


def _tokens(order: Tensor | None, columns: int, size: int, device: torch.device) -> Tensor:
    """The token at each place, int32 ``(tables, k_blocks, size)``; ``_NOWHERE`` where there is none."""
    places = torch.arange(columns, dtype=torch.int32, device=device).unsqueeze(0) if order is None else order
    if order is not None and order.shape[1] > columns:
        places = order.masked_fill(order < 0, _NOWHERE)
    return F.pad(places, (0, -places.shape[1] % size), value=_NOWHERE).unflatten(1, (-1, size))


def _parts(listed: Tensor, tokens: Tensor, begin: Tensor, rows: int, reach: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Of the listed blocks those that all queries see all of, and those of which some see some."""
    first, last = tokens.amin(-1).unsqueeze(1), tokens.amax(-1).unsqueeze(1)
    end = (begin + (tokens.shape[2] - 1)).clamp_max(rows - 1)
    seen, whole = listed, last < _NOWHERE
    if causal:
        seen, whole = seen & (first <= end), whole & (last <= begin)
    if reach >= 0:
        # The last token of a block with places that hold none is not known; such a block is cut, not left out.
        away = (last < begin - reach) | (first > end + reach)
        seen, whole = seen & away.logical_not(), whole & (first >= end - reach) & (last <= begin + reach)
    return seen & whole, seen & whole.logical_not()


def _mask(query: Tensor, token: Tensor, reach: int, causal: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is cut off, as an additive mask, of queries ``(pieces, size, 1)`` and tokens ``(pieces, 1, keys)``; and the
    queries that see none of them, ``(pieces, size, 1)``."""
    if causal and reach < 0:
        hidden, empty = token > query, token.amin(-1, keepdim=True) > query
    else:
        hidden = token > (query if causal else _NOWHERE - 1)
        hidden = (hidden | ((token - query).abs() > reach) if reach >= 0 else hidden).expand(-1, query.shape[1], -1)
        empty = hidden.all(-1, keepdim=True)
    least = torch.tensor(-torch.inf, dtype=dtype, device=query.device)
    return torch.where(hidden, least, torch.zeros_like(least)), empty


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one, in the memory of the first."""
    total = torch.logaddexp(lse, more_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    return out.mul_((lse - finite).exp_()).addcmul_(more, (more_lse - finite).exp_()), total


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of one piece with its log-sum-exp; what a row without keys gets there does not matter.

    Args:
        mask: added to the scores.
        causal: there are as many queries as keys, and none sees a later one.
    """
    return (_fused if q.device.type == "cpu" else _composed)(q, k, v, mask, scale, causal)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel. Against products and a softmax over one scratch: as fast on long runs, faster on short ones."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse.float()


def _composed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.mT).float() * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return torch.matmul(weights.to(v.dtype), v), lse
