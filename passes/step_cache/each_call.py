"""The base of step passes that work in models without denoising steps too, where nothing goes on from call to call."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from accelpass.ir.attention import Attention, detect
from accelpass.ir.core.program import Program
from accelpass.ir.transform.steps import step_blocks
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.step_cache.base import StepPass


@dataclass(frozen=True)
class EachCall(StepPass):
    """Sites are those of a denoiser's blocks; in a model that is none, every attention, which is rewritten once for all calls."""

    edits: ClassVar[frozenset[str]] = frozenset({"block.steps", "attention.blocks"})

    @abstractmethod
    def why_not(self, attention: Attention) -> str | None:
        """Why an attention is left as it is, or None."""

    @abstractmethod
    def once(self, attention: Attention, edit: Edits) -> str:
        """Rewrite an attention of a model without steps; returns what was done."""

    def find(self, program: Program) -> list[Any]:
        return super().find(program) if program.analysis(step_blocks) else list(program.analysis(detect))

    def whole(self, program: Program, sites: Any) -> str | None:
        if sites or program.analysis(step_blocks):
            return super().whole(program, sites)
        return "no attention was recognised"

    def aspects(self, site: Any) -> frozenset[str]:
        return frozenset({"attention.blocks"} if isinstance(site, Attention) else {"block.steps"})

    def check(self, site: Any, program: Program) -> Verdict:
        why = self.why_not(site) if isinstance(site, Attention) else None
        return Take() if why is None else Skip(why)

    def rewrite(self, site: Any, edit: Edits) -> Done | Skip | None:
        return Done(self.once(site, edit)) if isinstance(site, Attention) else super().rewrite(site, edit)
