"""Block-sparse attention whose heads have lists of their own, on the CPU: pieces of equal length are one batch.

A head's block of queries is too little work for all cores, and a loop over heads and blocks is mostly overhead. So the
blocks of all heads that read equally many keys are stacked, their keys gathered, and given to torch's kernel at once.
Blocks that all queries see need no mask; those that are cut (the diagonal) are computed apart and merged by their
log-sum-exp (Dao et al., 2022, arXiv 2205.14135), so that only they pay for one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.graph import aten

_KEYS = 16384
"""Keys that one batch gathers: enough work for all cores, and with their values few enough for a cache."""


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
    columns, groups = k.shape[2], heads // k.shape[1]
    q_blocks, most = blocks.shape[1:]
    device, pairs = q.device, batch * heads
    pair = torch.arange(pairs, device=device)
    tokens = _tokens(order, columns, size, device)
    own = pair % len(tokens)
    listed, counts = blocks.long()[pair % len(blocks)], counts[pair % len(blocks)]
    valid = torch.arange(most, device=device) < counts.unsqueeze(-1)
    first = tokens.amin(-1)[own].unsqueeze(1).expand(-1, q_blocks, -1).gather(2, listed)
    last = tokens.masked_fill(tokens >= columns, -1).amax(-1)[own].unsqueeze(1).expand(-1, q_blocks, -1)
    last = last.gather(2, listed)
    begin = (torch.arange(q_blocks, device=device) * size).unsqueeze(-1)
    end = (begin + (size - 1)).clamp_max(rows - 1)
    seen, whole = valid, valid
    if columns % size:
        whole = whole & (listed < tokens.shape[1] - 1)  # the last block has places without a token
    if causal:
        seen, whole = seen & (first <= end), whole & (last <= begin)
    if reach >= 0:
        seen = seen & (first <= end + reach) & (last >= begin - reach)
        whole = whole & (first >= end - reach) & (last <= begin + reach)
    padded = F.pad(q, (0, 0, 0, q_blocks * size - rows)).reshape(-1, 1, size, width)
    rows_of_k, rows_of_v = (t.reshape(-1, width) for t in (k, v))
    start = (pair // heads * k.shape[1] + pair % heads // groups) * columns
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # two parts are added: rounded once
    out = torch.zeros(pairs * q_blocks, size, width, dtype=wide, device=device)
    lse = torch.full((pairs * q_blocks, size), -torch.inf, device=device)
    for part, masked in ((seen & whole, False), (seen & whole.logical_not(), True)):
        number = part.sum(-1).flatten()
        chosen = listed.masked_fill(part.logical_not(), tokens.shape[1]).sort(-1).values.flatten(0, 1)
        for count in number.unique().tolist():
            if not count:
                continue
            for at in (number == count).nonzero().flatten().split(max(1, _KEYS // (count * size))):
                of = at // q_blocks
                token = tokens[own[of].unsqueeze(-1), chosen[at, :count]].flatten(1)
                rows_at = (start[of].unsqueeze(-1) + token.clamp_max(columns - 1)).flatten()
                keys, values = (t.index_select(0, rows_at).view(len(at), 1, -1, width) for t in (rows_of_k, rows_of_v))
                if not masked:
                    made, logs = dense(padded[at], keys, values, None, scale)
                    out[at], lse[at] = made.squeeze(1).to(wide), logs.squeeze(1)
                    continue
                query = begin[at % q_blocks] + torch.arange(size, device=device)
                hidden = _hidden(query.unsqueeze(-1), token.unsqueeze(1), columns, reach, causal)
                mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(1)
                made, logs = dense(padded[at], keys, values, mask, scale)
                empty = hidden.all(-1)
                made = made.squeeze(1).to(wide).masked_fill(empty.unsqueeze(-1), 0.0)
                out[at], lse[at] = _merged(out[at], lse[at], made, logs.squeeze(1).masked_fill(empty, -torch.inf))
    out, lse = (t.view(batch, heads, q_blocks * size, *t.shape[2:])[:, :, :rows] for t in (out, lse))
    return out, lse


def _tokens(order: Tensor | None, columns: int, size: int, device: torch.device) -> Tensor:
    """The token at each place, ``(tables, k_blocks, size)``; ``columns`` where there is none."""
    places = torch.arange(columns, device=device).unsqueeze(0) if order is None else order.long()
    return F.pad(places, (0, -columns % size), value=columns).unflatten(1, (-1, size))


def _hidden(query: Tensor, token: Tensor, columns: int, reach: int, causal: bool) -> Tensor:
    """What is cut off, of queries ``(pieces, size, 1)`` and tokens ``(pieces, 1, keys)``."""
    hidden = (token >= columns).expand(-1, query.shape[1], -1)
    if causal:
        hidden = hidden | (token > query)
    return hidden | ((token - query).abs() > reach) if reach >= 0 else hidden


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one."""
    total = torch.logaddexp(lse, more_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    shares = ((one - finite).exp().unsqueeze(-1) for one in (lse, more_lse))
    return out * next(shares) + more * next(shares), total


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
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
