"""DiTFastAttn's plan search: at each step, module after module, the cheapest method that changes the output little enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError
from accelpass.passes.core.staged import FULL, Site
from accelpass.passes.step_cache.base import StepSearch, Trial, why_no_window
from accelpass.passes.step_cache.ditfastattn import (
    HALF,
    LETTERS,
    METHODS,
    SHARE,
    WINDOW,
    WINDOW_HALF,
    DiTFastAttn,
    parsed,
)

_KEEPS = {FULL: "full+residual+output", HALF: "half+residual+output", WINDOW: "window+output"}
_ACTIONS = {**_KEEPS, WINDOW_HALF: "window+half+output", SHARE: SHARE}
_LETTER = {method: letter for letter, method in LETTERS.items()}


def relative_difference(raw: Tensor, out: Tensor) -> float:
    """The authors' loss: mean of ``|(a - b) / (max(a, b) + 1e-6)|``, each term at most 10.

    The denominator is the larger number, not the larger magnitude, as in their code: plans depend on it.
    """
    return ((raw - out) / (torch.maximum(raw, out) + 1e-6)).abs().clamp(0, 10).mean().item()


@dataclass(frozen=True)
class InSearch(DiTFastAttn):
    """The pass while its plan is searched: any method anywhere, everything kept."""

    searcher: Any = field(default=None, compare=False, kw_only=True)

    searching: ClassVar[bool] = True

    @property
    def decides(self) -> StepSearch | None:
        found: StepSearch | None = self.searcher
        return found

    def actions(self, site: str) -> Sequence[str]:
        return (FULL, *_ACTIONS.values())

    def action(self, step: int, site: str, branch: int = 0) -> str:
        return _KEEPS[FULL]

    def acted(self, program: Program, site: Site, action: str) -> str:
        # A module that no window is possible at keeps no residual either, and can still be shared.
        if "residual" in action and why_no_window(program, site) is not None:
            action = action.replace("+residual", "")
        return super().acted(program, site, action)


class DiTFastAttnSearch(StepSearch):
    """Section 3.4 of the paper: greedy over steps and modules, with the threshold growing from module to module.

    With guidance as two calls, the methods are chosen in the first and hold for both; C and X are then not tried.
    """

    def __init__(self, wanted: DiTFastAttn, tell: Callable[[str], None]) -> None:
        self.in_search = InSearch(**{**vars(wanted), "methods": {}, "timesteps": ()}, searcher=self)
        self.wanted, self.tell = wanted, tell
        self.letters: dict[str, str] = {}
        self.times: list[float] = []
        self.latents: tuple[int, ...] = ()
        self.guidance: Literal["batch", "calls", "none"] = "none"
        self.row: tuple[tuple[str, ...], ...] = ()

    def choose(self, trial: Trial) -> tuple[tuple[str, ...], ...]:
        if trial.branch:
            self.guidance = "calls"
            return self.row
        if trial.step == 0:
            self._begin(trial)
        self.times.append(trial.time)
        row = [[_KEEPS[FULL]] * len(block) for block in trial.sites]
        if trial.step:
            self._greedy(trial, row)
        for block, actions in zip(trial.sites, row, strict=True):
            for (_, path), action in zip(block, actions, strict=True):
                self.letters[path] = self.letters.get(path, "") + _LETTER[parsed(action)[0]]
        counts = Counter(parsed(action)[0] for actions in row for action in actions)
        self.tell(f"step {trial.step}: {', '.join(f'{m} {n}' for m, n in counts.most_common())}")
        self.row = tuple(map(tuple, row))
        return self.row

    def _begin(self, trial: Trial) -> None:
        if self.times:
            raise PassError("ditfastattn: the plan is searched in one sampling run, and a second one began")
        self.latents = tuple(trial.latents.shape[1:])
        halves = trial.latents.chunk(2)
        if len(trial.latents) % 2 == 0 and torch.equal(*halves):
            self.guidance = "batch"

    def _greedy(self, trial: Trial, row: list[list[str]]) -> None:
        raw = trial.run([(FULL,) * len(block) for block in trial.sites])[0][0]
        places = [(i, j) for i, block in enumerate(trial.sites) for j in range(len(block))]
        methods = [m for m in METHODS if self.guidance == "batch" or m not in (HALF, WINDOW_HALF)]
        for at, (block, index) in enumerate(places):
            for method in methods:
                row[block][index] = _ACTIONS[method]
                if trial.can(block, tuple(row[block])):
                    # Modules after this one are in full.
                    made = trial.run(tuple(map(tuple, row)))[0][0]
                    if relative_difference(raw, made) < self.wanted.threshold * (at + 1) / len(places):
                        break
            else:
                row[block][index] = _KEEPS[FULL]

    def found(self) -> DiTFastAttn:
        return replace(
            self.wanted,
            methods=self.letters,
            timesteps=tuple(self.times),
            latents=self.latents,
            guidance=self.guidance,
        )
