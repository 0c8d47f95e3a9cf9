"""Storage of a layer some of whose heads see words alone: single tokens leave out visual keys there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.kv.banks import RowFormat
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query


@dataclass(frozen=True)
class WordHeads(Positions):
    """All tokens; tokens after the prompt see words alone in the ``heads``. A call gives ``words``, bool ``(batch, capacity)``.

    Attributes:
        heads: query heads.
        renormalised: visual keys take no part in the softmax there; if not, their probability is lost.
    """

    part: ClassVar[str] = "word_heads"
    heads: tuple[int, ...]
    renormalised: bool

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        self.fill(held, new, layout, format)
        segment = self.segment(held, new, query, layout, format)
        scores = query.logits(segment)  # (batch, kv_heads, groups, tokens, rows)
        here = torch.tensor([h in self.heads for h in range(layout.kv_heads * layout.groups)], device=scores.device)
        hidden = here.view(-1, layout.groups, 1, 1) & new.given["words"].logical_not()[:, None, None, None]
        if self.renormalised:
            scores = scores.masked_fill(hidden, float("-inf"))
        paid = scores.softmax(-1).masked_fill(hidden, 0.0)
        values = format.decode(segment.chosen(segment.values), torch.float32)
        made = torch.matmul(paid.flatten(2, 3), values).unflatten(2, (layout.groups, -1))
        return made.flatten(1, 2).to(query.dtype)
