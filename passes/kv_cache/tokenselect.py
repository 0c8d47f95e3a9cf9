"""TokenSelect: each token reads the cached tokens that the heads vote for (arXiv 2411.02886, EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.one_row import unnormalised_softmax
from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import RowFormat, buffer
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, RowSelect, Segment, bank
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.heavy_hitters import pooled


@dataclass(frozen=True)
class Voted(RowSelect):
    """The first ``sinks`` rows, the ``newest``, and the ``budget`` between them with the most votes, the same for all heads.

    A head's vote is its softmax over the tokens between, of scores that are not scaled.
    """

    part: ClassVar[str] = "tokenselect"
    budget: int
    sinks: int
    newest: int
    reuse: float | None
    kernel: int

    def states(self, layout: Layout) -> list[StateSpec]:
        if self.reuse is None:
            return []
        return [
            buffer("voted.query", (layout.kv_heads * layout.groups * layout.width,), torch.float32),
            buffer("voted.rows", (min(self.budget, layout.capacity),), torch.int64, -1),
            buffer("voted.total", (1,), torch.int64, -1),
        ]

    def attend(
        self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat, rows: Tensor | None
    ) -> tuple[Tensor, None]:
        total = new.total.unsqueeze(-1)
        chosen = self._votes(held, new, query, layout, format)
        if self.reuse is not None:
            chosen = self._remembered(held, new, chosen, self.reuse)
        index = torch.arange(max(self.sinks, self.newest), device=total.device)
        first = index[: self.sinks].expand(len(total), -1)
        last = total - 1 - index[: self.newest]
        # A token is read once, whichever of the three it belongs to; rows below 0 are none.
        first = first.masked_fill(first >= total, -1)
        last = last.masked_fill(last < self.sinks, -1)
        chosen = chosen.masked_fill((chosen < self.sinks) | (chosen >= total - self.newest), -1)
        at = torch.cat([first, chosen, last], -1).unsqueeze(1).expand(-1, layout.kv_heads, -1)
        segment = Segment(format, bank(held, "keys"), bank(held, "values"), at, at >= 0, rows=at.clamp_min(0))
        return query.attend(segment).out, None

    def _votes(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        """The rows that heads vote for, ``(batch, budget)``, -1 where there are fewer."""
        place, total = torch.arange(layout.capacity, device=new.count.device), new.total[:, None]
        between = (place >= self.sinks) & (place < total - self.newest)
        scores = query.logits(Positions().segment(held, new, query, layout, format)) / query.spec.scale
        hidden = between.logical_not()[:, None, None, None]
        (weights,), share = unnormalised_softmax([scores.masked_fill(hidden, float("-inf"))])
        votes = (weights * share).sum((1, 2, 3))
        if self.kernel > 1:
            votes = pooled(votes, self.kernel, "max")
        best = torch.topk(votes.masked_fill(between.logical_not(), -1.0), min(self.budget, layout.capacity), -1)
        return best.indices.masked_fill(best.values < 0, -1)

    def _remembered(self, held: Held, new: New, chosen: Tensor, least: float) -> Tensor:
        """The rows of an earlier token whose queries were as these are; those of this token are remembered otherwise."""
        query, before = new.q.float().flatten(1), held["voted.query"]
        alike = torch.cosine_similarity(query, before, -1) >= least
        # The first token after a prompt chooses anew, a second prompt's too.
        again = (alike & (held["voted.total"][:, 0] == new.count)).unsqueeze(-1)
        chosen = torch.where(again, held["voted.rows"], chosen)
        held["voted.query"].copy_(torch.where(again, before, query))
        held["voted.rows"].copy_(chosen)
        held["voted.total"].copy_(new.total.unsqueeze(-1))
        return chosen


@dataclass(frozen=True)
class TokenSelect(KVPass):
    """Keep everything; each token of an answer reads the first tokens, the newest, and those that the heads vote for.

    Each head's scores become a softmax, and their sum says which tokens are read, the same for all heads. Prompts are dense (the paper
    selects for each chunk of one), and keys keep their own positions (the paper can number them anew). Scores are those of the model,
    masked and biased, without the scale (for models with a bias: inferred). A query head votes on its own key/value head (in the
    authors' kernel on another one, which their grouping does not mean).

    Attributes:
        budget: tokens that are voted for.
        sinks: first tokens that are always read.
        newest: tokens that are always read.
        reuse: the votes of an earlier token are taken again while queries are so alike (cosine over all heads, inferred). 0.9 in the
            paper; None, as in the authors' released code, votes for each token. It saves no time here: votes are counted anyway.
        kernel: votes are pooled by their maximum over so many neighbours, an odd number; 1 does not pool.

    Raises:
        OptionError: no token that is voted for, a negative number, a similarity above 1 or below -1, an even kernel.
    """

    name: ClassVar[str] = "tokenselect"
    summary: ClassVar[str] = "each token reads those tokens of a KVCache that the heads vote for; all are kept"
    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1 << 20}
    reads: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    budget: int = 2048
    sinks: int = 128
    newest: int = 512
    reuse: float | None = None
    kernel: int = 1

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise self.fail("budget", "1 token or more")
        if self.sinks < 0:
            raise self.fail("sinks", "0 or more first tokens")
        if self.newest < 1:
            raise self.fail("newest", "1 token or more, so that each token reads itself")
        if self.reuse is not None and not -1 <= self.reuse <= 1:
            raise self.fail("reuse", "a cosine between -1 and 1, or None")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise self.fail("kernel", "an odd number of tokens; 1 does not pool")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        what = f"reads {self.sinks} first, {self.newest} newest and {self.budget} voted tokens"
        if isinstance(spec.select, BlockSelect):
            return spec, what  # the prompt reads blocks; single tokens come in graphs of their own
        voted = Voted(self.budget, self.sinks, self.newest, self.reuse, self.kernel)
        return spec.edited(by=self.name, select=voted), what
