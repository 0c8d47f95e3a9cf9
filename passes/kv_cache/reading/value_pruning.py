"""Values of the likeliest tokens alone: the local value pruning of SpAtten (arXiv 2012.09852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.kv.banks import RowFormat, taken_rows
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, RowSelect, bank
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass


@dataclass(frozen=True)
class LikeliestValues(RowSelect):
    """All keys are read; of values, the rows with the ``count`` largest probabilities of each key/value head."""

    part: ClassVar[str] = "likeliest_values"
    count: int

    def attend(
        self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat, rows: Tensor | None
    ) -> tuple[Tensor, None]:
        probs = query.logits(Positions().segment(held, new, query, layout, format)).softmax(-1)
        count = min(self.count, layout.capacity)
        best = torch.topk(probs.sum((2, 3)), count, -1).indices
        at = best[:, :, None, None].expand(*probs.shape[:-1], count)
        values = taken_rows(bank(held, "values"), best)
        out = format.mixed(probs.gather(-1, at).squeeze(3), values).unsqueeze(3)
        return out.flatten(1, 2).to(query.dtype), None


@dataclass(frozen=True)
class ValuePruning(KVPass):
    """Each token of an answer reads the keys of all tokens, and the values of those that it finds likeliest.

    Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021: local value pruning,
    which forgets nothing, as each token chooses anew. Probabilities are those of the whole softmax, and are not made to sum to 1 again
    (inferred: the hardware multiplies what it fetched). Heads that share values choose by the sum of their probabilities (inferred; the
    paper has no such heads).

    Calls of several tokens, prompts above all, are dense, and the report says so. The paper chooses for one query at a time, each query other
    values, as its hardware streams queries one by one. Here the queries of a prompt share a read of each value: to gather ``values`` of them
    for every query would read ``values`` rows for each where that reads one, and needs all probabilities in memory, which attention by blocks
    never has. Candidates of an assistant are tokens that come one by one.

    Attributes:
        values: how many values each key/value head reads; 307 of 993 is the paper's for GPT-2.

    Raises:
        OptionError: fewer than 1.
    """

    name: ClassVar[str] = "value_pruning"
    summary: ClassVar[str] = "each token reads all keys of a KVCache, and the values of the likeliest tokens alone"
    paper: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    identity: ClassVar[dict[str, Any] | None] = {"values": 1 << 20}
    reads: ClassVar[frozenset[str]] = frozenset({"attention.format"})
    values: int = 307

    def __post_init__(self) -> None:
        if self.values < 1:
            raise self.fail("values", "1 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        if site.capacity <= self.values:
            return Skip(f"its {site.capacity} rows are no more than values={self.values}")
        what = f"single tokens read {self.values} of {site.capacity} values, a prompt all: its queries share each read"
        if isinstance(spec.select, BlockSelect):
            return spec, what  # the prompt reads blocks; single tokens come in graphs of their own
        return spec.edited(by=self.name, select=LikeliestValues(self.values)), what
