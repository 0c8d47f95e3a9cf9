"""YOPO: visual tokens see their neighbours, few heads look at them, narrow MLPs compute them, late layers do without (arXiv 2410.06169)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import Block
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.tap import Tap
from accelpass.passes.core.base import Calibrated, Done, Record, Run, Skip
from accelpass.passes.core.site_pass import claim
from accelpass.passes.token_pruning.gone import noted, recalled, store
from accelpass.passes.visual_tokens.inside import NotPruned, VisualPruning, by_token, entry_of, grid_of, visual_places
from accelpass.passes.visual_tokens.less_work.narrow import narrow, why_not_narrow
from accelpass.passes.visual_tokens.less_work.neighbours import Neighbours, why_not
from accelpass.passes.visual_tokens.less_work.word_heads import WordHeads

WORDS = 2
"""The number under which a cache remembers which of its tokens are words."""


@dataclass(frozen=True)
class Yopo(VisualPruning, Calibrated):
    """Visual tokens cost less than words: a window of neighbours, some heads without them, narrower MLPs, and late layers without any.

    Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See". In the first ``layer`` layers a
    visual token sees those at most ``window // 2`` rows and columns away, behind it too, and of the words those before it; its
    MLP has the first 1/``narrow`` of the hidden channels. The layers behind do not have visual tokens at all: the same as
    the authors' code for Qwen2-VL, which hides their keys before the softmax; that for LLaVA zeroes their probabilities after it,
    for which they would have to be there. From layer ``first`` on, heads that hardly look at images see words alone: the
    queries of words lose the probability of visual keys after the softmax, unless ``renorm``, and those of visual tokens get
    nothing. Which heads, ``accelpass.calibrate`` measures: on each text, the attention of words to visual keys over that to words;
    without a plan, all look.

    The authors train the model with the window and the narrow MLPs; as it is, a model stands ``window=0, narrow=1`` best. Several
    images of a text do not see each other (inferred). Narrow rows read views of the float weights, which other passes leave as
    they are. Nothing is smaller in the caches of the first layers.

    Attributes:
        layer: layers that have visual tokens; the paper's 20 of LLaVA-1.5, 24 of Qwen2-VL. As many as there are: all have.
        window: rows and columns that a visual token sees, odd; 0 for what the model lets it see.
        narrow: the hidden channels that an MLP has, over those that visual tokens are computed with; 1 for all.
        grid: rows and columns of an image in visual tokens; None for those of the tower's patches, or for a square.
        causal: a visual token sees its neighbours before it alone.
        first: layers whose heads all look at images.
        threshold: a head looks at the image of a text if its ratio is above this; for calibration.
        votes: share of texts, above which a head that looked there is kept.
        renorm: visual keys take no part in the softmax of heads without them, and need not be there.
    """

    layer: int = 20
    window: int = 5
    narrow: int = 2
    grid: tuple[int, int] | None = None
    causal: bool = False
    first: int = 2
    threshold: float = 0.077
    votes: float = 0.4
    renorm: bool = False

    name: ClassVar[str] = "yopo"
    summary: ClassVar[str] = "visual tokens with a window, fewer heads and narrow MLPs, and none in late layers"
    paper: ClassVar[str] = "YOPO, arXiv 2410.06169"
    identity: ClassVar[dict[str, Any] | None] = {"layer": 1 << 16, "window": 0, "narrow": 1, "first": 1 << 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0 or (self.window and self.window % 2 == 0):
            raise self.fail("window", "an odd number of rows and columns, or 0 for what the model lets a token see")
        if self.grid is not None and min(self.grid) < 1:
            raise self.fail("grid", "two numbers of at least 1, or None")
        if self.narrow < 1:
            raise self.fail("narrow", "a number of parts, at least 1, of which visual tokens have the first")
        if self.first < 0:
            raise self.fail("first", "a number of layers, 0 or more")
        if not self.threshold >= 0 or not 0 <= self.votes <= 1:
            raise self.fail(
                "votes" if self.threshold >= 0 else "threshold", "a number from 0; votes are a share up to 1"
            )

    def left(self, each: int) -> int:
        return 0

    def score(self, program: Program, attention: fx.Node, before: fx.Node) -> fx.Node:
        run = lambda q: [torch.zeros((q.shape[0], q.shape[2]), dtype=torch.float32, device=q.device)]  # noqa: E731
        return inserted(program, before, run, attention.args[0])[0]

    def early(self, program: Program, record: Record, layers: Sequence[Block], sites: Sequence[KVSite]) -> None:
        by_node = {site.attention: site for site in sites}
        is_prompt = not sites or sites[0].is_prompt
        silent = {b.path: self._silent(program, b) if n >= self.first else () for n, b in enumerate(layers)}
        of = {b.path: [by_node[a.node] for s in b.sublayers for a in s.attentions if a.node in by_node] for b in layers}
        rows: tuple[fx.Node, fx.Node] | None = None
        if is_prompt:
            try:
                rows, grid = self._rows(program, layers[0])
            except NotPruned as why:
                record.skip("early layers", str(why))
            else:
                for block in layers:
                    self._cheaper(program, record, block, silent[block.path], *rows, grid)
        stored = [(site, WordHeads(silent[b], self.renorm)) for b, sites_ in of.items() if silent[b] for site in sites_]
        if not stored:
            return
        if is_prompt:
            noted(program, WORDS, rows and rows[0])
        given = {} if is_prompt else {"words": recalled(program, WORDS)}
        for site, how in stored:  # in each graph of the model
            store(program, self, site, given, how)
            if not is_prompt:
                record.take(site.path, Done(f"{len(how.heads)} heads read words alone"))

    def _rows(self, program: Program, first: Block) -> tuple[tuple[fx.Node, fx.Node], tuple[int, int]]:
        """Which rows of the stream are words, and which are visual tokens; how these lie in an image."""
        mask, each = visual_places(program, value(first.input).shape[0])
        grid = (1, 1) if not self.window else self.grid or grid_of(program, each)
        if each % (grid[0] * grid[1]):
            raise NotPruned(f"{each} visual tokens of a text are no images of grid={grid}")
        words, visual = inserted(program, max(mask, first.input).next, partial(_parted, each), mask, first.input)
        return (words, visual), grid

    def _cheaper(
        self,
        program: Program,
        record: Record,
        block: Block,
        silent: tuple[int, ...],
        words: fx.Node,
        visual: fx.Node,
        grid: tuple[int, int],
    ) -> None:
        """Rewrite one layer of a prompt with images."""
        if isinstance(record.wants(block.path), Skip):
            record.skip(block.path, "named in skip_sites")
            return
        said: list[str] = []
        for attention in (a for s in block.sublayers for a in s.attentions if a.node is not None):
            node = attention.node
            assert node is not None
            if not self.window and not silent:
                continue
            spec, why = spec_of(node), why_not(spec_of(node), node)
            if why is not None:
                record.skip(attention.path, why)
                continue
            reach = self.window // 2 if self.window else None
            select = Neighbours(
                value(visual).shape[1] // math.prod(grid), *grid, reach, self.causal, silent, self.renorm
            )
            claim(program, self.name, self.edits, [attention.path])
            node.args = (*node.args[:3], [*node.args[3], words, visual], *node.args[4:])
            set_spec(node, spec.edited(by=self.name, select=select))
            said += [f"a window of {self.window}"] if self.window else []
            said += [f"{len(silent)} heads see words alone"] if silent else []
        for mlp in (m for s in block.sublayers for m in s.mlps if self.narrow > 1):
            why = why_not_narrow(mlp)
            try:
                if why is not None:
                    raise CannotResize(why)
                kept = narrow(program, mlp, words, visual, self.narrow)
                said.append(f"{kept} of {mlp.down.in_features} hidden channels for visual tokens")
            except CannotResize as cause:
                record.skip(mlp.path, str(cause))
        if said:
            record.take(block.path, Done(", ".join(said)))

    # --- calibration

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        """How many texts each head looked at the image of, ``yopo/votes/<attention>``, and last how many there were: ``(heads + 1,)``."""
        taps = [
            Tap(f"{a.path}.q", partial(_looked, self.threshold, a.spec.scale), also=partial(_seen_by, a.path))
            for a in program.analysis(detect)
            if a.node is not None and a.kind == "self"
        ]
        found = run.gather(taps, "which heads look at images")
        if not found:
            raise PassError("yopo: no image enters a text in these batches; give the model's image inputs with them")
        return {f"yopo/votes/{name.removesuffix('.q')}": votes for name, votes in found.items()}

    def _silent(self, program: Program, block: Block) -> tuple[int, ...]:
        """The heads that the plan leaves without images."""
        for attention in (a for s in block.sublayers for a in s.attentions if a.node is not None):
            found = program.artefacts.get(f"yopo/votes/{attention.path}")
            if found is None:
                continue
            heads = value(attention.node.args[0]).shape[1]  # type: ignore[union-attr]
            if found.shape != (heads + 1,) or not bool(found.isfinite().all()) or found[-1] < 1:
                raise PlanError(
                    f"yopo: the plan has votes of {list(found.shape)} for {attention.path}, and this model has {heads} heads "
                    "there, and a finite number of texts after them; calibrate again with this model"
                )
            most = math.floor(self.votes * float(found[-1]))
            return tuple(h for h in range(heads) if found[h] <= most)
        return ()


def _parted(each: int, mask: Tensor, x: Tensor) -> list[Tensor]:
    order = by_token(mask, each).long().expand(x.shape[0], -1).sort(dim=-1, stable=True).indices
    return [order[:, : x.shape[1] - each], order[:, x.shape[1] - each :]]


def _seen_by(path: str, program: Program) -> list[fx.Node]:
    """What queries of an attention see: its keys, and the mask of visual tokens where an image enters the text."""
    found = [a.node.args[1] for a in program.analysis(detect) if a.path == path and a.node is not None]
    try:
        return [found[0], *(m for m in (entry_of(program).mask,) if m is not None)]
    except NotPruned:
        return found[:1]


def _looked(threshold: float, scale: float, q: Tensor, k: Tensor, *mask: Tensor) -> Tensor:
    """In how many texts each head looks at the image, and how many texts there are: float32 ``(heads + 1,)``."""
    if not mask or mask[0].shape[1] != q.shape[2]:
        return torch.zeros(q.shape[1] + 1, device=q.device)
    visual = by_token(mask[0], None)[:, None, None].float()
    scores = torch.matmul(q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    paid = scores.masked_fill(later, float("-inf")).softmax(-1) * (1 - visual.mT)  # the queries of words
    seen, others = ((paid * part).sum((2, 3)) for part in (visual, 1 - visual))
    return torch.cat([(seen > threshold * others).float().sum(0), seen.new_full((1,), float(q.shape[0]))])
