"""The base of passes that choose, from a first look at the prompt, the tokens that the model then reads."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.kv.shortened import note
from accelpass.ir.transform.sequence.again import again
from accelpass.ir.transform.sequence.prompt import NoPrompt, Prompt, prompt
from accelpass.ir.transform.splice import splice, trace
from accelpass.ir.transform.steps import drop_dead_writes, survived
from accelpass.passes.core.base import Done, Record, Skip
from accelpass.passes.token_pruning.look import chosen, operands_of
from accelpass.passes.token_pruning.shortened_prompt import ShortenedPrompt


@dataclass(frozen=True)
class PromptFilter(ShortenedPrompt):
    """A prompt is read twice, in one graph: up to the attention that chooses the tokens, and by the model, which reads these alone.

    Tokens after the prompt see the chosen ones only; their graphs are made to count as the cache does.

    Attributes:
        keep: how many tokens are chosen; a prompt of no more is read as it is.
    """

    keep: int = 1024

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

    def shorten(self, program: Program, record: Record) -> None:
        found = prompt(program)
        attention = found.attentions[self.layer_of(found)]
        if isinstance(record.wants(attention.path), Skip):
            raise NoPrompt(f"{attention.path}, whose queries would choose, is named in skip_sites")
        if not found.tokens > self.keep:  # of a symbolic length this adds the guard that it always is, or never
            raise NoPrompt(f"{attention.path}: a prompt of at most {self.keep} tokens is read as it is")
        region = [n for n in program.graph.nodes if n.op == "call_function"]
        assert attention.node is not None
        operands, masks = operands_of(attention.node)
        traced = trace(program, lambda q, k, *extras: chosen(self.choose, masks, q, k, extras), operands)
        rows, positions, seen, moved, visible = splice(program, traced, operands, attention.node)
        again(program, found, region, rows, positions)
        note(program, rows, seen, moved, visible)
        survived(program, attention.path, rows, found.tokens)
        drop_dead_writes(program.graph)
        record.take(attention.path, Done(f"its queries choose {self.keep} of the prompt's tokens"))
