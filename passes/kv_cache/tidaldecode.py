"""TidalDecode: tokens chosen in two layers serve all the layers after them (arXiv 2410.05076, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from accelpass.ir.attention.block_select import BlockSelect, not_a_prompt
from accelpass.ir.attention.spec import AttentionSpec
from accelpass.ir.errors import PassError
from accelpass.ir.kv.banks import RowFormat
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Positions, Query, RowSelect, Segment, bank
from accelpass.ir.program import Program
from accelpass.passes.base import CalibratedOnLoss, Study
from accelpass.passes.kv_cache.base import KVPass, refuse

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
    tokens that have labels (give it texts with a question, and labels for the answer alone). Without it, it is ``reselect``.

    Attributes:
        budget: rows that a sparse layer reads.
        first: layers before the first choice, which attend to all.
        reselect: the layer that chooses anew; the paper's for Llama-3-8B. A model of fewer layers chooses once.
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
    after: ClassVar[tuple[str, ...]] = ("h2o", "kv_window", "mikv", "cskv")
    budget: int = 256
    first: int = 2
    reselect: int = 13
    by: By = "layer"

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
        elif number in (self.first, self._reselect(program)):
            role = "select"
        what = {
            "full": "attends to all tokens",
            "select": f"attends to all tokens and chooses {self.budget}",
            "sparse": f"reads the {self.budget} chosen tokens",
        }
        if isinstance(spec.select, BlockSelect):
            return spec, what[role]  # the prompt reads blocks; single tokens come in graphs of their own
        return spec.edited(by=self.name, select=SharedRows(role, self.budget, self.by)), what[role]

    def _reselect(self, program: Program) -> int:
        found = program.artefacts.get(RESELECT)
        return self.reselect if found is None else int(found)

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """The layer after which the answers' loss is least, and the perplexity for each layer, the dense model's first.

        Raises:
            PassError: an attention is not a plain causal one of a prompt over itself; names it.
        """
        dense = _Decoded(self, None, study)
        found = [study.perplexity(dense.attend, "the dense model")]
        layers = range(self.first + 1, len(dense.layers))
        if not layers:
            raise PassError(
                f"tidaldecode: a model of {len(dense.layers)} layers has none after first={self.first} to choose in"
            )
        found += [
            study.perplexity(_Decoded(self, at, study).attend, f"layer {at} of {len(dense.layers)}") for at in layers
        ]
        best = min(layers, key=lambda at: found[1 + at - layers.start])
        return {RESELECT: torch.tensor(best), "tidaldecode/perplexity": torch.tensor(found, dtype=torch.float64)}


class _Decoded:
    """Attends to a whole text as if the tokens that count had been decoded one by one after the rest.

    Attributes:
        reselect: None for the dense model.
        layers: sites in the order in which they run.
    """

    def __init__(self, chosen: TidalDecode, reselect: int | None, study: Study) -> None:
        self.chosen, self.reselect, self.study = chosen, reselect, study
        self.layers: dict[str, int] = {}
        self._listed: Tensor | None = None

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        number = self.layers.setdefault(spec.site, len(self.layers))
        why = not_a_prompt(spec, q, k)
        if why is not None:
            raise PassError(f"tidaldecode: {spec.site}: {why}; calibrate on texts without padding")
        if self.reselect is None or number < self.chosen.first:
            return None
        start = q.shape[2] - self.study.counted
        out = sdpa(q[:, :, :start], k[:, :, :start], v[:, :, :start], is_causal=True, scale=spec.scale, enable_gqa=True)
        seen = torch.ones(q.shape[2] - start, k.shape[2], dtype=torch.bool, device=q.device).tril(start)
        if number in (self.chosen.first, self.reselect):
            self._listed = self._choice(spec, q[:, :, start:], k, seen)
            mask = seen
        else:
            assert self._listed is not None
            mask = self._listed
        rest = sdpa(q[:, :, start:], k, v, mask, scale=spec.scale, enable_gqa=True)
        return torch.cat([out, rest], 2)

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
