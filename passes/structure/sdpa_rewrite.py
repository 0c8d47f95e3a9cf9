"""The base of passes that write a ``scaled_dot_product_attention`` call anew."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention import Attention, SdpaCall, detect
from accelpass.ir.program import Program
from accelpass.ir.splice import Tracer
from accelpass.passes.base import Done, Pass, Record, Skip


@dataclass(frozen=True)
class SdpaRewrite(Pass):
    """Finds the calls; a pass says which it takes and what it puts in their place."""

    phase: ClassVar[str] = "kernels"
    exact: ClassVar[bool] = True

    @abstractmethod
    def suitable(self, attention: Attention) -> SdpaCall | str:
        """The call to rewrite, or why this attention is left alone."""

    @abstractmethod
    def rewrite(self, attention: Attention, sdpa: SdpaCall, tracer: Tracer) -> Done:
        """Rewrite the call, with what ``tracer`` traces if need be; says what was done."""

    def apply(self, program: Program, record: Record) -> None:
        tracer = Tracer(program)
        for attention in program.analysis(detect):
            wanted = record.wants(attention.path)
            sdpa = wanted.why if isinstance(wanted, Skip) else self.suitable(attention)
            if isinstance(sdpa, str):
                record.skip(attention.path, sdpa)
            else:
                record.take(attention.path, self.rewrite(attention, sdpa, tracer))
