"""A loop of one body that the capture has unrolled: compiled once, run as often as it is needed (recurrent depth)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from accelpass.ir.analyses.recurrence import Loop, loops
from accelpass.ir.core.program import Program
from accelpass.ir.transform.steps import StepBlock
from accelpass.passes.core.base import Done, Skip
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.core.staged import FULL, Site, StagedCall, StagedPass
from accelpass.passes.structure.decoder_blocks import drop_dead, hand_on

PASSED = "passed by"


@dataclass(frozen=True)
class RollLoop(StagedPass):
    """Fold blocks of the same parameters into one body with a trip count, and stop when another trip would change little.

    What "A Survey on Latent Reasoning" (arXiv 2507.06203) calls activation-based recurrence: Universal Transformers, ALBERT, recurrent
    depth. A trip ends the loop for the whole batch where, for each of its sequences, ``||h' - h|| < exit_eps ||h||`` (of a tensor without a
    batch, two dimensions, as a whole). That the measure is taken of each sequence, and which loop of several is taken, is inferred. One
    number is read back after each trip. Trips that were trained to differ little at the end lose nothing; others are another model.

    Attributes:
        exit_eps: the change, of the state, below which the loop ends; 0 runs all trips.
        max_iter: trips that are run at most.
    """

    exit_eps: float = 1e-3
    max_iter: int = 32

    name: ClassVar[str] = "roll_loop"
    summary: ClassVar[str] = "a body that is run again and again is compiled once, and ends when its state settles"
    paper: ClassVar[str] = "A Survey on Latent Reasoning, arXiv 2507.06203"
    phase: ClassVar[str] = "structure"
    identity: ClassVar[dict[str, Any] | None] = {"exit_eps": 0.0, "max_iter": 1 << 20}
    nothing: ClassVar[str] = (
        "no parameters are read by several trips of one body (tied weights; equal ones are not enough)"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.exit_eps < 1:
            raise self.fail("exit_eps", "a share of the state's norm, from 0, below 1")
        if self.max_iter < 1:
            raise self.fail("max_iter", "a number of trips, at least 1")

    def loop(self, program: Program) -> tuple[Loop | None, str]:
        """The loop that is rolled, or why there is none."""
        found = program.analysis(loops)
        if not found:
            return None, self.nothing
        if program.frontend == "export":
            return None, "the host ends the loop, and an exported graph runs without it"
        why = ""
        for loop in found:
            if loop.writes:
                why = f"{loop.path}: each trip writes keys and values, which later tokens expect of all trips"
            elif loop.inside:
                why = f"{loop.path}: the states of single trips are returned or read elsewhere"
            else:
                return loop, ""
        return None, why

    def stack(self, program: Program) -> Sequence[StepBlock]:
        loop, _ = self.loop(program)
        if loop is None:
            return ()
        return [
            StepBlock(number, f"{loop.path}#{number + 1}", (before,), (after,), (), nodes)
            for number, (nodes, before, after) in enumerate(
                zip(loop.iterations, loop.carried[:-1], loop.carried[1:], strict=True)
            )
        ]

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(block.path, block) for block in blocks[1:]]

    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        return [tuple(PASSED if can(path) else FULL for path in paths)]

    def find(self, program: Program) -> list[Site]:
        return self.places(self.stack(program))[::-1]

    def whole(self, program: Program, sites: Sequence[Any]) -> str | None:
        return self.loop(program)[1] or None

    def rewrite(self, site: Site, edit: Edits) -> Done | Skip | None:
        if self.asked(edit.program, site) == FULL:
            loop = self.loop(edit.program)[0]
            return None if loop is None else Done(f"one body: {loop}")
        return super().rewrite(site, edit)

    def acted(self, program: Program, site: Site, action: str) -> str:
        hand_on(site)
        drop_dead(program, site)
        return "passed by once the state has settled"

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        done = False
        for number in call.blocks:
            before = None if done or not self.exit_eps else call.stream(number - 1)
            call.run(number, PASSED if done else FULL)
            if before is not None:
                done = settled(before, call.stream(number), self.exit_eps)
            done = done or number + 1 >= self.max_iter
        return call.results()


def settled(before: Tensor, after: Tensor, eps: float) -> bool:
    """Whether a trip changed the state of no sequence ``(batch, ...)`` by more than ``eps`` of its norm."""
    old, new = (t.float().flatten(1 if t.dim() > 2 else 0) for t in (before, after))
    return bool(((new - old).norm(dim=-1) < eps * old.norm(dim=-1).clamp_min(1e-12)).all())
