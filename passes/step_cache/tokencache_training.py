"""TokenCache's predictor: trained on the frozen model by mixing each block's new output with the one of the step before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.errors import PassError
from accelpass.passes.step_cache.base import StepSearch, Trial, state_name
from accelpass.passes.step_cache.tokencache import IMPORTANCE, KEEP, MIX, TokenCache

_START = 2.0
"""Logits begin here: an importance of 0.88, so that the mixture begins near the dense model and has a slope."""


@dataclass(frozen=True)
class InTraining(TokenCache):
    """The pass while its predictor is trained."""

    searcher: Any = field(default=None, compare=False, kw_only=True)

    searching: ClassVar[bool] = True

    @property
    def decides(self) -> StepSearch | None:
        found: StepSearch | None = self.searcher
        return found

    def bound(self, artefacts: Any, device: torch.device) -> InTraining:
        return self

    def actions(self, site: str) -> Sequence[str]:
        return (KEEP, MIX)

    def action(self, step: int, site: str, branch: int = 0) -> str:
        return KEEP

    def operand(self, name: str, step: int) -> Tensor | None:
        path, _, what = name.rpartition(":")
        found: Tensor | None = self.searcher.weights.get(path) if what == "weight" else None
        return found


class TokenCacheTraining(StepSearch):
    """The paper's relaxed objective: the final block's output with mixtures, ``w f(z) + (1 - w) cached``, against that without.

    Cached is the dense output of the step before. The loss of a step is relative to how much the output changes from the
    step before, and the mean importance is added with the weight ``pressure`` (both inferred); Adam on a table of logits by
    block, step and token.
    """

    options: ClassVar[dict[str, Any]] = {"lowering": "aten"}

    def __init__(self, wanted: TokenCache, tell: Callable[[str], None]) -> None:
        self.in_search = InTraining(**{**vars(wanted), "timesteps": ()}, searcher=self)
        self.wanted, self.tell = wanted, tell
        self.weights: dict[str, Tensor] = {}
        self.logits: list[Tensor] = []
        self.optimizers: list[torch.optim.Adam] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.latents: tuple[int, ...] = ()
        self.before: dict[int, Tensor] = {}

    def choose(self, trial: Trial) -> tuple[tuple[str, ...], ...]:
        row = tuple((KEEP,) * len(block) for block in trial.sites)
        paths = [path for block in trial.sites for _, path in block]
        end = state_name(paths[-1], "output")
        kept = trial.run(row)[1]
        if end not in kept:
            raise PassError(f"tokencache: the output of {paths[-1]} is not kept, so there is nothing to train on")
        if trial.step == 0:
            self.latents = tuple(trial.latents.shape[1:])
        if trial.branch == 0 and trial.step == len(self.times):
            self.times.append(trial.time)
            self._new(kept, paths)
        if trial.step:
            self._train(trial, kept[end], end)
        else:
            self.tell("a new run")
        self.before[trial.branch] = kept[end]
        return row

    def _new(self, kept: dict[str, Tensor], paths: Sequence[str]) -> None:
        tokens = {path: int(kept[state_name(path, "output")].shape[-2]) for path in paths}
        # One table for all: blocks over another number of tokens (text beside the image) stay whole.
        (count, _), *_ = Counter(tokens.values()).most_common(1)
        self.paths = [path for path in paths if tokens[path] == count]
        device = kept[state_name(paths[0], "output")].device
        self.logits.append(torch.full((len(self.paths), count), _START, device=device, requires_grad=True))
        self.optimizers.append(torch.optim.Adam([self.logits[-1]], lr=self.wanted.rate))

    def _train(self, trial: Trial, dense: Tensor, end: str) -> None:
        logits = self.logits[trial.step]
        row = [
            tuple(MIX if path in self.paths and trial.can(i, (MIX,)) else KEEP for _, path in block)
            for i, block in enumerate(trial.sites)
        ]
        if all(action == KEEP for block in row for action in block):
            raise PassError(
                "tokencache: no block's output can be mixed with a cached one, so there is nothing to train"
            )
        with torch.enable_grad():
            weights = logits.sigmoid()
            self.weights = dict(zip(self.paths, weights.unbind(), strict=True))
            mixed = trial.run(row)[1][end]
            change = (dense - self.before[trial.branch]).square().mean().clamp_min(1e-12)
            error = (mixed - dense).square().mean() / change
            loss = error + self.wanted.pressure * weights.mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
        self.optimizers[trial.step].step()
        self.weights = {}
        self.tell(f"step {trial.step}: error {error.item():.3f}, mean importance {weights.mean().item():.2f}")

    def found(self) -> TokenCache:
        return replace(self.wanted, timesteps=tuple(self.times), latents=self.latents, paths=tuple(self.paths))

    def tensors(self) -> dict[str, Tensor]:
        table = torch.stack([t.detach().sigmoid() for t in self.logits], 1)
        table[:, 0] = 1  # nothing is cached yet
        return {IMPORTANCE: table.half().cpu()}
