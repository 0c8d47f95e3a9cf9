"""Attention with what passes want to know of its probabilities, block of rows by block of rows.

No row block's probabilities outlive the next one, so statistics over all queries cost one pass and no (tokens x tokens)
memory. Also in one pass: a second softmax from the log-sum-exp would compute every product twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.lower import Lowering, register_lowering
from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.op import fake_statistics
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Dense, Places
from accelpass.ir.core.graph import value

_ROWS = 384
"""Query rows of one key/value head at a time: large enough for the matrix product, and their scores stay in the cache."""
_OUTSIDE = ("sink", "drop", "view")


@torch.library.custom_op("accelpass::attention_blocks", mutates_args=())
def attention_blocks(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> list[Tensor]:
    """As ``accelpass::attention_stats`` (output, then statistics by name), for ``(batch, heads, tokens, d)`` operands."""
    parsed = AttentionSpec.from_json(spec)
    batch, heads, rows, _ = q.shape
    kv_heads, columns, groups = k.shape[1], k.shape[2], parsed.groups
    out = v.new_empty((batch, heads, rows, v.shape[-1]))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    taps, places = parsed.taps, torch.arange(max(rows, columns), device=q.device)
    sums = {name: q.new_zeros((batch, kv_heads, columns), dtype=torch.float32) for name in taps}
    causal = parsed.causal or (parsed.bias == "causal" and rows == columns)
    first = 0 if causal else columns - rows
    block = max(1, _ROWS // groups)
    later = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1) if parsed.causal else None
    softmax = parsed.softmax
    if parsed.causal and not parsed.before:  # each query sees itself, so no row can be without keys
        softmax = replace(softmax, kind="softmax")
    q = q * parsed.scale
    plain = not parsed.before and not parsed.after and softmax.kind == "softmax" and softmax.value is None
    # Two buffers for all blocks: fresh memory for each would cost as much as the softmax.
    scratch = [q.new_empty(groups * block * columns) for _ in range(2)]
    ones = q.new_ones(groups * block)
    for b in range(batch):
        for h in range(kv_heads):
            mine = slice(h * groups, (h + 1) * groups)
            for low in range(0, rows, block):
                high = min(low + block, rows)
                seen = min(high, columns) if causal else columns
                lines = groups * (high - low)
                flat, other = (t[: lines * seen].view(lines, seen) for t in scratch)
                torch.mm(q[b, mine, low:high].reshape(lines, -1), k[b, h, :seen].t(), out=flat)
                scores = flat.view(groups, high - low, seen)
                if later is not None and seen > low:
                    scores[..., low:seen].masked_fill_(later[: high - low, : seen - low], -torch.inf)
                if not plain:
                    cut = [_cut(e, b, mine, low, high, seen, rows, columns) for e in extras]
                    scores = steps.apply(scores, parsed.before, cut)
                if "lse" in parsed.statistics:
                    lse[b, mine, low:high] = torch.logsumexp(scores.float(), -1)
                for name, tap in taps.items():
                    if name != "column_sums" and (tap.rows is None or high > rows - tap.rows):
                        at = Places(places[low:high] + first, places[:seen], columns, head=h)
                        sums[name][b, h, :seen] += tap(scores.float()[None, None], at)[0, 0]
                if plain:
                    probabilities = torch.softmax(flat, -1, out=other)
                else:
                    probabilities = steps.apply(scores, (softmax, *parsed.after), cut).reshape(lines, seen)
                if "column_sums" in taps:
                    # A row without keys (padding) has no probabilities, and is in no sum.
                    got = torch.mv(probabilities.t(), ones[:lines].to(probabilities))
                    sums["column_sums"][b, h, :seen] += torch.nan_to_num(got)
                made = torch.mm(probabilities.to(v.dtype), v[b, h, :seen])
                out[b, mine, low:high] = made.view(groups, high - low, -1)
    found = {"lse": lse, **sums}
    return [out, *(found[name] for name in sorted(parsed.statistics))]


@attention_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> list[Tensor]:
    return [v.new_empty((*q.shape[:-1], v.shape[-1])), *fake_statistics(q, k, AttentionSpec.from_json(spec))]


def _cut(extra: Tensor, b: int, heads: slice, low: int, high: int, seen: int, rows: int, columns: int) -> Tensor:
    """The part of a mask or bias ``(batch, heads, rows, columns)``, any of which may be 1 or missing, for one block."""
    full = extra[(None,) * max(0, 4 - extra.dim())]
    if full.shape[-1] == columns and columns != 1:
        full = full[..., :seen]
    if full.shape[-2] == rows and rows != 1:
        full = full[..., low:high, :]
    if full.shape[1] != 1:
        full = full[:, heads]
    return full[b if full.shape[0] != 1 else 0]


def _why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    if not spec.statistics:
        return "no statistics are wanted"
    if not isinstance(spec.store, Dense) or not isinstance(spec.select, All):
        return "keys and values are stored, or selected, in a way of their own"
    outside = [s.kind for s in spec.steps if s.kind in _OUTSIDE]
    if outside:
        return f"a step {outside[0]} rearranges the scores"
    if any(value(n).dim() != 4 for n in node.args[:3]) or any(value(n).dim() > 4 for n in node.args[3]):
        return "operands are not (batch, heads, tokens, d)"
    return None


def _run(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    anywhere = replace(spec, site="", edits=())  # the same call in every layer, so that equal layers share code
    out, *found = torch.ops.accelpass.attention_blocks(q, k, v, list(extras), anywhere.to_json())
    return out, dict(zip(sorted(spec.statistics), found, strict=True))


register_lowering(Lowering("row_blocks", _why_not, _run, in_python=True))
