"""The base of passes that shorten a prompt once, for all layers of a language model and for its cache."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.core.program import Program
from accelpass.ir.kv.shortened import follow
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.transform.sequence.prompt import NoPrompt
from accelpass.passes.core.base import Done, Pass, Record


@dataclass(frozen=True)
class ShortenedPrompt(Pass):
    """The cache holds fewer tokens than the caller's ids have; graphs of later tokens are made to count as it does.

    Class attributes:
        source: what the tokens are chosen from, as the report has it where none are.
    """

    phase: ClassVar[str] = "structure"
    reads: ClassVar[frozenset[str]] = frozenset({"block.steps"})
    for_prompts: ClassVar[bool] = True
    source: ClassVar[str] = "prompt"

    @property
    def cache_mark(self) -> str:
        return self.name

    @abstractmethod
    def shorten(self, program: Program, record: Record) -> None:
        """Rewrite the graph of a prompt.

        Raises:
            NoPrompt: nothing can be left out; says why. What was inserted by then is taken back.
        """

    def apply(self, program: Program, record: Record) -> None:
        sites = kv_sites(program)
        if sites and not all(s.is_prompt for s in sites):
            done = follow(program)
            record.take("later tokens", Done(f"{' and '.join(done) or 'counters'} follow the short sequence"))
            return
        program.survivors = {}
        before = set(program.graph.nodes)
        try:
            self.shorten(program, record)
        except NoPrompt as why:
            for node in reversed(list(program.graph.nodes)):
                if node not in before:
                    program.graph.erase_node(node)
            record.skip(self.source, str(why))
