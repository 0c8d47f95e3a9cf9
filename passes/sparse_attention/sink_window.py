"""The first tokens and a window of the newest, the same in every head: what MoA is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelpass.ir.core.program import Program
from accelpass.passes.sparse_attention.span_pass import SpanPass
from accelpass.passes.sparse_attention.spans import EVERYTHING, Rule


@dataclass(frozen=True)
class SinkWindow(SpanPass):
    """Each query sees the first ``sinks`` tokens and the newest, together a share of the prompt's length.

    StreamingLLM's mask with a window that grows with the prompt, as the uniform baseline of MoA (arXiv 2406.14909) at equal
    density. A KVCache keeps as much, and room for an answer.

    Attributes:
        density: share of the prompt that its last query sees, sinks included; 1 is the dense model.

    Raises:
        OptionError: a density outside (0, 1], sinks that are not a multiple of ``block``, a negative reserve.
    """

    name: ClassVar[str] = "sink_window"
    summary: ClassVar[str] = (
        "prompts and a KVCache of first tokens and a window that grows with the prompt, in all heads"
    )
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, as compared with in arXiv 2406.14909"
    identity: ClassVar[dict[str, Any] | None] = {"density": 1.0}
    density: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise self.fail("density", "a share of the prompt above 0, at most 1 (1 keeps everything)")
        super().__post_init__()

    def rules(self, program: Program, path: str, kv_heads: int) -> Sequence[Rule]:
        return [EVERYTHING if self.density == 1 else (-float(self.sinks), self.density)]
