"""Keys in two halves of a byte, the lower one read where the upper leaves attention flat: SpAtten's progressive quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, Quantized, RowFormat, buffer
from accelpass.ir.kv.rows import pack, unpack
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, Segment, Storage, bank
from accelpass.ir.transform.splice import plain_form
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.kv_quant import cannot_pack

_LOW = 16
"""Codes from -127 to 127 are 16 times the upper half, and the lower half, from 0 to 15."""
UPPER = Quantized(4, 1)
"""How upper halves are read: as they are packed, so that keys are nowhere written out in floats."""


def halves(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper and lower halves of the codes of rows ``(..., d)``, packed ``(..., d / 2)`` uint8, and a step for each row ``(..., 1)``."""
    step = keys.float().abs().amax(-1, keepdim=True) / 127
    codes = (keys.float() / step.clamp_min(1e-12)).round()
    high = (codes / _LOW).floor()
    return pack((high + 8).to(torch.uint8), 4), pack((codes - _LOW * high).to(torch.uint8), 4), step


def upper(high: Tensor, step: Tensor) -> list[Tensor]:
    """Upper halves as rows of :data:`UPPER`: below the keys, by up to 15 steps (truncated, as the paper has it)."""
    return [high, _LOW * step, -8 * _LOW * step]


@torch.library.custom_op("accelpass::refined_scores", mutates_args=())
def refined_scores(scores: Tensor, q: Tensor, low: Tensor, step: Tensor, threshold: float) -> Tensor:
    """Scores of upper halves ``(batch, kv_heads, groups, n)``; where no probability reaches the threshold, with the lower halves.

    An op of its own, so that lower halves are read only for key/value heads one of whose query heads is flat. On a GPU, where asking
    would wait for it, and in ONNX files they are read for all.

    Args:
        q: scaled queries ``(batch, kv_heads, groups, d)``; low: packed ``(batch, kv_heads, n, d / 2)``; step: ``(batch, kv_heads, n, 1)``.
    """
    if scores.device.type != "cpu":
        return refined_by_all(scores, q, low, step, threshold)
    flat, made = scores.softmax(-1).amax(-1) < threshold, scores.clone()
    for sequence, head in flat.any(-1).nonzero().tolist():
        wide = unpack(low[sequence, head], 4).float() * step[sequence, head]
        asking = flat[sequence, head].nonzero()[:, 0]
        made[sequence, head, asking] += q[sequence, head, asking] @ wide.mT
    return made


@refined_scores.register_fake
def _(scores: Tensor, q: Tensor, low: Tensor, step: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores)


@plain_form(refined_scores)
def refined_by_all(scores: Tensor, q: Tensor, low: Tensor, step: Tensor, threshold: float) -> Tensor:
    """The same, with all lower halves read."""
    flat = scores.softmax(-1).amax(-1, keepdim=True) < threshold
    return torch.where(flat, scores + torch.matmul(q, (unpack(low, 4).float() * step).mT), scores)


@dataclass(frozen=True)
class HalvedKeys(Storage):
    """All tokens, each in the row of its position; keys as two halves of 4 bits with a step, values in the cache's format."""

    part: ClassVar[str] = "halved_keys"
    knows_held: ClassVar[bool] = True
    by_position: ClassVar[bool] = True
    threshold: float

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, rows = layout.kv_heads, layout.capacity
        return [
            *(buffer(f"keys.{half}", (heads, rows, layout.width // 2), torch.uint8) for half in ("high", "low")),
            buffer("keys.step", (heads, rows, 1), torch.float32),
            *format.states("values", heads, rows, layout.value_width, layout.dtype),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        at = new.count[0] + torch.arange(new.k.shape[2], device=new.count.device)
        for name, rows in (("keys", halves(new.k)), ("values", format.encode(new.v))):
            for bank_of, made in zip(bank(held, name), rows, strict=True):
                bank_of.index_copy_(2, at, made.to(bank_of.dtype))

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        self.fill(held, new, layout, format)
        high, low, step = bank(held, "keys")
        values = bank(held, "values")
        keys = upper(high, step)
        if not query.one:  # several tokens, a further prompt: in full
            whole = UPPER.decode(keys, torch.float32) + unpack(low, 4).float() * step
            return query.attend(Segment(EXACT, [whole], values, value_format=format)).out
        segment = Segment(UPPER, keys, values, valid=Positions().seen(new, layout))
        scores = query.logits(segment).squeeze(3)
        scores = refined_scores(scores.contiguous(), query.q.squeeze(3).contiguous(), low, step, self.threshold)
        out = format.mixed(scores.softmax(-1), values)
        return out.unsqueeze(3).flatten(1, 2).to(query.dtype)


@dataclass(frozen=True)
class ProgressiveKeys(KVPass):
    """Keep keys in 8 bits; single tokens read the upper 4 of each, and the lower 4 where no key gets much of the attention.

    Wang et al., "SpAtten", HPCA 2021: progressive quantization. The rounding of a softmax that has a peak hardly shows, and that of a flat
    one does. Each head decides by itself: where the largest probability by the upper halves is below ``threshold``, the lower halves are
    read and the probabilities are made anew, once. Codes are symmetric with a step for each row (inferred: the paper's hardware has one for
    a tensor), and upper halves are truncated. Prompts, and further prompts, are computed in full. Values stay as they are. Query heads that
    share keys fetch the lower halves if one of them is flat, and the others do not use them. On a GPU, and in ONNX files, all heads fetch them.

    Attributes:
        threshold: 0.1 (inferred); 0 never reads the lower halves, above 1 always.

    Raises:
        OptionError: a negative threshold.
    """

    name: ClassVar[str] = "progressive_keys"
    summary: ClassVar[str] = (
        "keys of a KVCache as two halves of 4 bits; the lower is read where the upper leaves attention flat"
    )
    paper: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows", "attention.format"})
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise self.fail("threshold", "a probability, 0 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        why = cannot_pack(site, 1)
        if why is not None:
            return Skip(why)
        other = [s.kind for s in spec.before if s.kind not in MASKS and s.kind != "cast"]
        if other:
            return Skip(f"its scores go through {other[0]!r}, to which the lower halves cannot be added afterwards")
        what = "keys in two halves of 4 bits, the lower read where attention is flat"
        return spec.edited(by=self.name, store=HalvedKeys(self.threshold)), what
