"""TidalDecode: tokens chosen in two layers serve all the layers after them (arXiv 2410.05076, ICLR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError
from accelpass.ir.kv.banks import RowFormat
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, RowSelect, Segment, bank
from accelpass.passes.core.base import CalibratedOnLoss, Skip, Study
from accelpass.passes.kv_cache.base import KVPass

By = Literal["layer", "kv_head"]
RESELECT = "tidaldecode/reselect"


@dataclass(frozen=True)
class SharedRows(RowSelect):
    """One layer's part: ``full`` attends to all, ``select`` also chooses ``budget`` rows, ``sparse`` reads those chosen.

    ``by`` is as in :class:`TidalDecode`.
    """

    part: ClassVar[str] = "tidaldecode"
    role: Literal["full", "select", "sparse"]
    budget: int
    by: By

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
            if self.by == "layer":
                # One choice for all heads; the layer that chose may have more of them.
                rows = rows[:, :1].expand(-1, layout.kv_heads, -1)
            valid = rows < new.total[:, None, None]
            chosen = Segment(format, bank(held, "keys"), bank(held, "values"), rows, valid, rows=rows)
            return query.attend(chosen).out, None
        whole = Positions().segment(held, new, query, layout, format)
        if self.role == "full":
            return query.attend(whole).out, None
        if self.by == "layer":
            done = query.attend(whole, want=("mass",))
            score = done.mass[0].sum(1, keepdim=True)
        else:
            done = query.attend(whole, want=("logits",))
            score = done.logits[0]  # the order of scores before the softmax is the order after it
        place = torch.arange(layout.capacity, device=score.device)
        last = (new.total - 1)[:, None, None]
        # The current token is always among the rows; a row of no token never is while one of a token is left.
        score = score.masked_fill(place > last, float("-inf")).masked_fill(place == last, float("inf"))
        found = torch.topk(score, min(self.budget, layout.capacity), -1).indices
        return done.out, found.expand(-1, layout.kv_heads, -1).contiguous()


@dataclass(frozen=True)
class TidalDecode(KVPass, CalibratedOnLoss):
    """Full attention in the first layers, token positions chosen in two of them, only these rows read in all others.

    For single new tokens; prompts are dense, and the whole cache is kept. Cache correction is not done, as in the paper's
    main results. The layer that chooses anew decides the quality, and is another for each model: the paper tries all on
    needles in a text, and so does ``accelpass.calibrate(model, batches, passes=["tidaldecode"])``, on the loss of the
    tokens that have labels (give it texts with a question, and labels for question and answer alone). Without it, it is
    ``reselect``.

    Attributes:
        budget: rows that a sparse layer reads.
        first: layers before the first choice, which attend to all.
        reselect: the layer that chooses anew; the paper's for Llama-3-8B. A model of fewer layers chooses once. Several
            layers choose one after the other (ours: a small model's layers agree less); calibration finds as many.
        by: whose scores choose. ``layer``: one choice for all heads, as in the kernels of the paper's authors, by the
            probabilities summed over heads (inferred); ``kv_head``: each key/value head's own, by raw scores, summed over its
            query heads (inferred; the authors' simulation has one for each query head).

    Raises:
        OptionError: fewer than one row, or ``reselect`` not after ``first``.
    """

    name: ClassVar[str] = "tidaldecode"
    summary: ClassVar[str] = "two layers choose tokens of a KVCache, the layers after them read only those"
    paper: ClassVar[str] = "TidalDecode, arXiv 2410.05076"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1 << 20}
    reads: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    budget: int = 256
    first: int = 2
    reselect: int | tuple[int, ...] = 13
    by: By = "layer"

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise self.fail("budget", "1 row or more")
        if self.first < 0 or list(self._again) != sorted({n for n in self._again if n > self.first}):
            raise self.fail("reselect", f"a layer, or several in order, after first={self.first}, which is 0 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        role: Literal["full", "select", "sparse"] = "sparse"
        if number < self.first:
            role = "full"
        elif number in (self.first, *self._reselected(program)):
            role = "select"
        heads = [value(s.new[0]).shape[1] for s in program.analysis(kv_sites)]
        if self.by == "kv_head" and len(set(heads[self.first :])) > 1:
            return Skip(
                f"its layers have {sorted(set(heads))} heads with keys, each with a choice of its own; use by='layer'"
            )
        what = {
            "full": "attends to all tokens",
            "select": f"attends to all tokens and chooses {self.budget}",
            "sparse": f"reads the {self.budget} chosen tokens",
        }
        if isinstance(spec.select, BlockSelect):
            return spec, what[role]  # the prompt reads blocks; single tokens come in graphs of their own
        return spec.edited(by=self.name, select=SharedRows(role, self.budget, self.by)), what[role]

    @property
    def _again(self) -> tuple[int, ...]:
        return (self.reselect,) if isinstance(self.reselect, int) else self.reselect

    def _reselected(self, program: Program) -> tuple[int, ...]:
        found = program.artefacts.get(RESELECT)
        return self._again if found is None else tuple(found.flatten().tolist())

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """As many layers as ``reselect`` has, with which the answers' loss is least, and the perplexities on the way.

        One layer is the best of all, as in the paper. Of several each is the best beside those found before it, and then
        each but the last is looked for once more beside the others. ``tidaldecode/perplexity`` has a row for each search
        and a column for each layer (NaN where it was not tried); ``tidaldecode/dense`` is the dense model's.

        Raises:
            PassError: an attention is not a plain causal one of a prompt over itself; names it. Or no loss is finite.
        """
        dense = _Decoded(self, None)
        before = study.decoded(dense.attend, "the dense model")
        layers = range(self.first + 1, len(dense.layers))
        if not layers:
            raise PassError(
                f"tidaldecode: a model of {len(dense.layers)} layers has none after first={self.first} to choose in"
            )
        found: list[int] = []
        rows = []
        wanted = min(len(self._again), len(layers))
        for search in range(2 * wanted - 1):
            others = found if search < wanted else found[1:]  # the one found longest ago is looked for again
            row = torch.full((len(dense.layers),), math.nan, dtype=torch.float64)
            for at in layers:
                if at not in others:
                    what = f"search {search + 1} of {2 * wanted - 1}, layer {at} of {len(dense.layers)}"
                    row[at] = study.decoded(_Decoded(self, (*others, at)).attend, what)
            if not row.isfinite().any():
                raise PassError(
                    "tidaldecode: the answers' loss is not finite whatever layer chooses; check model and texts"
                )
            found = [*others, int(row.nan_to_num(math.inf).argmin())]
            rows.append(row)
        return {
            RESELECT: torch.tensor(sorted(found)),
            "tidaldecode/perplexity": torch.stack(rows),
            "tidaldecode/dense": torch.tensor(before, dtype=torch.float64),
        }


class _Decoded:
    """Attends as decoding does, for several tokens at once.

    Attributes:
        reselect: None for the dense model.
        layers: sites in the order in which they run.
    """

    def __init__(self, chosen: TidalDecode, reselect: tuple[int, ...] | None) -> None:
        self.chosen, self.reselect = chosen, reselect
        self.layers: dict[str, int] = {}
        self._listed: Tensor | None = None

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        number = self.layers.setdefault(spec.site, len(self.layers))
        read = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        if self.reselect is not None and number >= self.chosen.first:
            if number in (self.chosen.first, *self.reselect):
                self._listed = self._choice(spec, q, k, read)
            else:
                assert self._listed is not None
                read = self._listed
        return sdpa(q, k, v, read, scale=spec.scale, enable_gqa=True)

    def _choice(self, spec: AttentionSpec, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Which keys each query's sparse layers read, ``(batch, heads or 1, queries, tokens)``."""
        groups, hidden = spec.groups, seen.logical_not()
        scores = torch.matmul(q.float(), k.float().repeat_interleave(groups, 1).mT) * spec.scale
        if self.chosen.by == "layer":
            score = scores.masked_fill(hidden, float("-inf")).softmax(-1).sum(1, keepdim=True)
        else:
            score = scores.unflatten(1, (-1, groups)).sum(2).repeat_interleave(groups, 1)
        own = seen ^ seen.tril(seen.shape[1] - seen.shape[0] - 1)  # each query's own token
        score = score.masked_fill(hidden, float("-inf")).masked_fill(own, float("inf"))
        rows = score.topk(min(self.chosen.budget, k.shape[2]), -1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, rows, True) & seen
