"""The base of passes that write a ``scaled_dot_product_attention`` call anew."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention import Attention, SdpaCall, detect, sdpa_call
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Skip, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass


@dataclass(frozen=True)
class SdpaRewrite(SitePass):
    """Finds the calls; a pass says which it takes and what it puts in their place."""

    phase: ClassVar[str] = "kernels"
    exact: ClassVar[bool] = True
    edits: ClassVar[frozenset[str]] = frozenset({"attention.kernel"})
    nothing: ClassVar[str] = "no attention was recognised"

    @abstractmethod
    def suitable(self, attention: Attention, sdpa: SdpaCall) -> Verdict:
        """Whether a call is one to rewrite."""

    @abstractmethod
    def written(self, attention: Attention, sdpa: SdpaCall, edit: Edits) -> Done:
        """Rewrite the call; says what was done."""

    def find(self, program: Program) -> list[Attention]:
        found: list[Attention] = program.analysis(detect)
        return found

    def check(self, site: Attention, program: Program) -> Verdict:
        sdpa = sdpa_call(site)
        return Skip(sdpa) if isinstance(sdpa, str) else self.suitable(site, sdpa)

    def rewrite(self, site: Attention, edit: Edits) -> Done:
        sdpa = sdpa_call(site)
        assert not isinstance(sdpa, str)
        return self.written(site, sdpa, edit)
