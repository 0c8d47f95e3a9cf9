"""TidalDecode: tokens chosen in two layers serve all the layers after them (arXiv 2410.05076, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.block_select import BlockSelect
from accelpass.ir.attention.spec import AttentionSpec
from accelpass.ir.kv.banks import RowFormat
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, RowSelect, Segment, bank
from accelpass.ir.program import Program
from accelpass.passes.kv_cache.base import KVPass, refuse


@dataclass(frozen=True)
class SharedRows(RowSelect):
    """One layer's part: ``full`` attends to all, ``select`` also chooses ``budget`` rows, ``sparse`` reads those chosen."""

    part: ClassVar[str] = "tidaldecode"
    role: Literal["full", "select", "sparse"]
    budget: int

    @property
    def takes(self) -> str | None:
        return self.part if self.role == "sparse" else None

    @property
    def gives(self) -> str | None:
        return self.part if self.role == "select" else None

    def attend(
        self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if rows is not None:
            valid = rows < new.total[:, None, None]
            chosen = Segment(format, bank(held, "keys"), bank(held, "values"), rows, valid, rows=rows)
            return query.attend(chosen).out, None
        whole = Positions().segment(held, new, query, layout, format)
        if self.role == "full":
            return query.attend(whole).out, None
        done = query.attend(whole, want=("logits",))
        # The order of scores before the softmax is the order after it. The current token is always among the rows.
        score = done.logits[0]
        current = torch.arange(layout.capacity, device=score.device) == (new.total - 1)[:, None, None]
        score = score.masked_fill(current, float("inf"))
        return done.out, torch.topk(score, min(self.budget, layout.capacity), -1).indices


@dataclass(frozen=True)
class TidalDecode(KVPass):
    """Full attention in the first layers, token positions chosen in two of them, only these rows read in all others.

    For single new tokens; prompts are dense, and the whole cache is kept. Rows are chosen by raw scores, summed over the
    query heads of each key/value head (inferred; the kernels of the paper's authors share one choice among all heads, their
    simulation has one for each query head). Cache correction is not done, as in the paper's main results.

    Attributes:
        budget: rows that a sparse layer reads.
        first: layers before the first choice, which attend to all.
        reselect: the layer that chooses anew; the paper's for Llama-3-8B. A model of fewer layers chooses once.

    Raises:
        OptionError: fewer than one row, or ``reselect`` not after ``first``.
    """

    name: ClassVar[str] = "tidaldecode"
    summary: ClassVar[str] = "two layers choose tokens of a KVCache, the layers after them read only those"
    paper: ClassVar[str] = "TidalDecode, arXiv 2410.05076"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1 << 20}
    after: ClassVar[tuple[str, ...]] = ("h2o", "kv_window", "mikv", "cskv")
    budget: int = 256
    first: int = 2
    reselect: int = 13

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise self.fail("budget", "1 row or more")
        if self.first < 0 or self.reselect <= self.first:
            raise self.fail("reselect", f"a layer after first={self.first}, which is 0 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | str:
        refuse(spec, "store", self.name, "one chooses rows by position in a full cache, the other moves or drops rows")
        role: Literal["full", "select", "sparse"] = "sparse"
        if number < self.first:
            role = "full"
        elif number in (self.first, self.reselect):
            role = "select"
        what = {
            "full": "attends to all tokens",
            "select": f"attends to all tokens and chooses {self.budget}",
            "sparse": f"reads the {self.budget} chosen tokens",
        }
        if isinstance(spec.select, BlockSelect):
            return spec, what[role]  # the prompt reads blocks; single tokens come in graphs of their own
        return spec.edited(by=self.name, select=SharedRows(role, self.budget)), what[role]
