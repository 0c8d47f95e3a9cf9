"""The base of passes that choose, from a first look at the prompt, the tokens that the model then reads."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.ir.kv.shortened import follow
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.transform.prompt import NoPrompt, Prompt, prompt
from accelpass.ir.transform.splice import splice, trace
from accelpass.ir.transform.steps import drop_dead_writes
from accelpass.passes.core.base import Done, Pass, Record
from accelpass.passes.token_pruning.look import chosen, operands_of


@dataclass(frozen=True)
class PromptFilter(Pass):
    """A prompt is read twice: by a graph that ends where the tokens are chosen, and by the model, which reads these alone.

    The backend compiles both (:mod:`accelpass.backends.compile.filtered`). Tokens after the prompt see the chosen ones only; their
    graphs are made to count as the cache does by :meth:`apply`.

    Attributes:
        keep: how many tokens are chosen; a prompt of no more is read as it is.
    """

    keep: int = 1024

    phase: ClassVar[str] = "structure"
    claims: ClassVar[dict[str, str]] = {
        "calls": "a prompt is read once",
        "tokens": "the tokens of a prompt are chosen once, for all layers",
    }

    @abstractmethod
    def layer_of(self, found: Prompt) -> int:
        """The number of the attention at which the first look ends.

        Raises:
            NoPrompt: there is none that tells tokens apart.
        """

    @abstractmethod
    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Positions of the chosen tokens, ascending, ``(batch, keep)``.

        Args:
            q: the last token's queries, ``(batch, heads, d)``; k: ``(batch, kv_heads, tokens, d)``; both as the attention
                multiplies them.
            seen: which tokens are no padding, ``(batch, tokens)``.
        """

    def look(self, program: Program, found: Prompt) -> str:
        """Cut the graph off where tokens are chosen. It returns their positions, and what else :func:`chosen` says."""
        attention = found.attentions[self.layer_of(found)]
        assert attention.node is not None
        operands, seen = operands_of(attention.node)
        results = splice(
            program,
            trace(program, lambda q, k, *extras: chosen(self.choose, seen, q, k, extras), operands),
            operands,
            attention.node,
        )
        (output,) = program.graph.find_nodes(op="output")
        output.args = (tuple(results),)
        for append in program.graph.find_nodes(op="call_function", target=KV_APPEND):
            program.graph.erase_node(append)
        drop_dead_writes(program.graph)
        program.gm.recompile()
        program.changed()
        return attention.path

    def apply(self, program: Program, record: Record) -> None:
        """Graphs of a prompt that is not shortened say why; those of later tokens follow the short sequence."""
        sites = kv_sites(program)
        if sites and not all(s.is_prompt for s in sites):
            done = follow(program)
            record.take("later tokens", Done(f"{' and '.join(done) or 'counters'} follow the short sequence"))
            return
        if self.name in program.refused:
            record.skip("prompt", program.refused[self.name])
            return
        try:
            found = prompt(program)
            layer = found.attentions[self.layer_of(found)]
            record.skip("prompt", f"{layer.path}: a prompt of at most {self.keep} tokens is read as it is")
        except NoPrompt as why:
            record.skip("prompt", str(why))

    def shortens(self, found: Prompt) -> bool:
        """Whether a prompt is long enough; of a symbolic length this adds the guard that it always is, or never."""
        return bool(found.tokens > self.keep)
