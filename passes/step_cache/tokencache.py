"""TokenCache: at most steps, most blocks compute their important tokens alone and take the others from the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PlanError
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.steps import StepBlock, StepError, recall_new
from accelpass.passes.core.staged import FULL, Site, appending, put
from accelpass.passes.step_cache.base import (
    Searched,
    StepPass,
    StepSearch,
    keep,
    kept,
)

IMPORTANCE = "tokencache.importance"
KEEP, REUSE, MIX, TOKENS = "full+output", "reuse", "mix", "tokens "


@dataclass(frozen=True)
class TokenCache(StepPass, Searched):
    """Tokens of little importance at a block and step are dropped from its computation; their output is the cached one.

    Lou et al., "Token Caching for Diffusion Transformer Acceleration", arXiv 2409.18523. Importance comes from a trained
    predictor that knows block, step and position and not the content (``accelpass.search_steps`` trains it). Steps
    alternate between full ones, which refresh all caches, and prediction steps (two-phase round-robin). What the
    sources read do not say is marked (inferred) in the method's notes: the values of all defaults; that pruned tokens
    leave keys and values too; that round-robin means that the blocks which are spared rotate; that both guidance
    halves share their tokens.

    Attributes:
        ratio: share of a block's tokens that is pruned; 1 takes the whole block from the cache (inferred).
        intervals: every how many steps a full one comes, in the first and in the second phase (inferred).
        boundary: share of the steps after which the second phase begins (inferred).
        blocks: share of the blocks that is pruned at a prediction step, the least important ones (inferred).
        rotation: every ``rotation``-th block is spared, others at the next prediction step, so that each is computed in
            full at least every ``rotation`` prediction steps; 0 spares none (inferred).
        pressure: weight of the mean importance in the predictor's loss, without which all would be important (inferred).
        rate: learning rate of its training with Adam.
        paths: the blocks in the order of the trained table.
    """

    ratio: float = 0.5
    intervals: tuple[int, ...] = (2, 3)
    boundary: float = 0.5
    blocks: float = 0.75
    rotation: int = 4
    pressure: float = 0.1
    rate: float = 0.2
    paths: tuple[str, ...] = ()

    name: ClassVar[str] = "tokencache"
    summary: ClassVar[str] = "unimportant tokens of a block come from the last denoising step"
    paper: ClassVar[str] = "arXiv:2409.18523"
    identity: ClassVar[dict[str, Any] | None] = {"ratio": 0.0}

    def __post_init__(self) -> None:
        for share in ("ratio", "boundary", "blocks"):
            if not 0 <= getattr(self, share) <= 1:
                raise self.fail(share, "a share from 0 to 1")
        if len(self.intervals) != 2 or min(self.intervals) < 1:
            raise self.fail("intervals", "two numbers of steps, each at least 1")
        if self.rotation < 0 or self.rotation == 1:
            raise self.fail("rotation", "0 for none, or 2 and more")

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(block.path, block) for block in blocks]

    def bound(self, artefacts: Mapping[str, Tensor], device: torch.device) -> TokenCache:
        if IMPORTANCE not in artefacts or not self.paths or not self.timesteps:
            raise PlanError(
                "tokencache needs a trained predictor: plan = accelpass.search_steps(model, sample, ['tokencache'], runs=20), "
                "then options={'plan': plan}"
            )
        table = artefacts[IMPORTANCE].float()
        if table.dim() != 3 or table.shape[:2] != (len(self.paths), len(self.timesteps)):
            raise PlanError(
                f"tokencache: the predictor's table is {list(table.shape)}; {len(self.paths)} blocks and "
                f"{len(self.timesteps)} steps need [{len(self.paths)}, {len(self.timesteps)}, tokens]"
            )
        return Trained(**vars(self), importance=table.to(device))

    def action(self, step: int, site: str, branch: int = 0) -> str:
        raise PlanError("tokencache has no predictor yet")  # bound() has been asked before

    def shown(self, action: str) -> str:
        return f"tokens {1 - self.ratio:.0%}" if action.startswith(TOKENS) else super().shown(action)

    def horizon(self) -> int:
        return len(self.timesteps)

    def acted(self, program: Program, site: Site, action: str) -> str:
        graph, outputs = program.graph, site.block.outputs
        last = max(outputs)
        if action == KEEP:
            keep(program, site, "output", outputs[:1], outputs[:1])
            return "all tokens"
        (cache,) = kept(program, site, "output", outputs[:1])
        if action == REUSE:
            if len(outputs) > 1:
                raise CannotResize("its second stream has no tokens to prune, and must be computed")
            with appending(last) as build:
                made = [build(aten.alias.default, cache)]
            put(site, made)
            keep(program, site, "output", made, outputs)
            return "nothing"
        if action == MIX:
            weight = recall_new(program, f"{site.path}:weight", value(outputs[0]).shape[-2:-1], torch.float32)
            with appending(last) as build:
                column = build(aten.unsqueeze.default, weight, -1)
                change = build(aten.mul.Tensor, build(aten.sub.Tensor, outputs[0], cache), column)
                mixed = build(aten.add.Tensor, cache, change)
            put(site, [mixed, *outputs[1:]])
            keep(program, site, "output", [mixed], outputs[:1])
            return "a mixture of new and cached tokens"
        count = int(action.removeprefix(TOKENS))
        rows = recall_new(program, f"{site.path}:rows", (count,), torch.int64)
        found, stream = program.analysis(axes), site.block.inputs[0]

        def take(node: fx.Node, dim: int) -> fx.Node:
            return call(graph, node, aten.index_select.default, node, dim, rows)

        with appending(last) as build:
            resizer = Resizer(graph, found, found.of(stream)[-2], count, take)
            first, *others = resizer.copy(site.block.region, outputs)
            whole = build(aten.index_copy.default, cache, value(cache).dim() - 2, rows, first)
        put(site, [whole, *others])
        keep(program, site, "output", [whole], outputs[:1])
        return f"{count} tokens, the others as they were"

    def search(self, tell: Callable[[str], None]) -> StepSearch:
        from accelpass.passes.step_cache.tokencache_training import TokenCacheTraining

        return TokenCacheTraining(self, tell)


@dataclass(frozen=True)
class Trained(TokenCache):
    """The pass with its predictor.

    Attributes:
        importance: ``(blocks, steps, tokens)`` in 0..1.
    """

    importance: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0), compare=False, repr=False, kw_only=True)

    def action(self, step: int, site: str, branch: int = 0) -> str:
        pruned = self.pruned
        if step >= len(pruned):
            raise StepError(f"the plan of tokencache has {len(pruned)} model calls, and this is number {step + 1}")
        if site not in self.paths or not any(site in now for now in pruned):
            return FULL
        count = self.kept_tokens
        if site not in pruned[step]:
            return KEEP
        return REUSE if count == 0 else f"{TOKENS}{count}"

    @property
    def kept_tokens(self) -> int:
        """How many tokens of a pruned block are computed."""
        tokens = self.importance.shape[-1]
        return tokens - round(self.ratio * tokens)

    @cached_property
    def pruned(self) -> tuple[frozenset[str], ...]:
        """By step, the blocks that compute some of their tokens alone."""
        steps, schedule = len(self.timesteps), []
        boundary, turn = round(self.boundary * steps), 0
        for step in range(steps):
            into, interval = (step, self.intervals[0]) if step < boundary else (step - boundary, self.intervals[1])
            if step == 0 or into % interval == 0 or self.kept_tokens == self.importance.shape[-1]:
                schedule.append(frozenset[str]())
                continue
            ranked = (
                self.importance[:, step].mean(-1).argsort(stable=True).tolist()[: round(self.blocks * len(self.paths))]
            )
            spared = turn % self.rotation if self.rotation else None
            chosen = (b for b in ranked if spared is None or b % self.rotation != spared)
            schedule.append(frozenset(self.paths[b] for b in chosen))
            turn += 1
        return tuple(schedule)

    def operand(self, name: str, step: int) -> Tensor | None:
        path, _, what = name.rpartition(":")
        return self.rows(path, step) if what == "rows" and path in self.paths else None

    def rows(self, path: str, step: int) -> Tensor:
        """Positions of the tokens that are computed, ascending: those of the largest importance."""
        if (path, step) not in self._rows:
            importance = self.importance[self.paths.index(path), step]
            self._rows[path, step] = importance.topk(self.kept_tokens).indices.sort().values
        return self._rows[path, step]

    @cached_property
    def _rows(self) -> dict[tuple[str, int], Tensor]:
        return {}
