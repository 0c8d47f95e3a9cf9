"""The base of passes that leave blocks of a decoder out, whatever the model, and what becomes of their keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.core.graph import aten, is_call, mutates, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.transform.steps import StepBlock, decoder_stack
from accelpass.ir.transform.tokens import CannotCut
from accelpass.passes.core.staged import FULL, Site, StagedPass, appending, put
from accelpass.passes.kv_cache.base import NO_CACHE

OUT, COPY = "left out", "keys and values alone"
_DONE = {OUT: "left out", COPY: "the stream passes by; its keys and values are kept"}


@dataclass(frozen=True)
class DecoderBlocks(StagedPass):
    """Chooses which blocks of a decoder compute; a block that does not hands its stream on as it is."""

    phase: ClassVar[str] = "structure"
    instead: ClassVar[str] = OUT
    """What a block does that does not compute."""

    @abstractmethod
    def spared(self, depth: int) -> Iterable[int]:
        """Numbers of the blocks that some call may leave out, of ``depth``."""

    def fixed(self, program: Program) -> bool:
        """Whether every call leaves out the same blocks, so that there is nothing to choose."""
        return False

    def why_not(self, program: Program) -> str | None:
        """Why all blocks of this graph compute, or None."""
        try:
            decoder_stack(program)
        except CannotCut as cause:
            return str(cause)
        if self.fixed(program):
            return None
        if program.frontend == "export":
            return "the host chooses at each call which layers compute, and an exported graph runs without it"
        sites = program.analysis(kv_sites)
        if not sites:
            return f"without a cache no token comes after others: {NO_CACHE}"
        return "a prompt is computed in full" if any(s.is_prompt for s in sites) else None

    def stack(self, program: Program) -> Sequence[StepBlock]:
        return () if self.fixed(program) or self.why_not(program) else decoder_stack(program)

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        spared = set(self.spared(len(blocks)))
        return [Site(block.path, block) for block in blocks if block.number in spared]

    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        return [tuple(self.instead if can(path) else FULL for path in paths)]

    def acted(self, program: Program, site: Site, action: str) -> str:
        hand_on(site)
        if action == OUT:
            inside = set(site.block.region)
            for append in program.graph.find_nodes(op="call_function", target=KV_APPEND):
                if append.args[0] in inside:
                    program.unwritten.add(append.args[2].name)
                    program.graph.erase_node(append)
        drop_dead(program, site)
        return _DONE[action]

    def find(self, program: Program) -> list[Site]:
        return [] if self.why_not(program) else self.places(decoder_stack(program))[::-1]

    def whole(self, program: Program, sites: Sequence[Site]) -> str | None:
        return self.why_not(program)

    def asked(self, program: Program, site: Site) -> str:
        return self.instead if self.fixed(program) else super().asked(program, site)


def hand_on(site: Site) -> None:
    """Let the streams pass by a block as they are."""
    with appending(max(site.results)) as build:
        passed = [build(aten.alias.default, stream) for stream in site.streams]
    put(site, passed)


def drop_dead(program: Program, site: Site) -> None:
    """Erase what a block computes and nothing reads.

    Dead code elimination leaves an attention alone, as it may draw random numbers (dropout), and what asserts on values.
    """
    for node in sorted(site.block.region, reverse=True):
        for user in [u for u in node.users if is_call(u, aten._assert_tensor_metadata)]:
            program.graph.erase_node(user)
        if not node.users and not mutates(node) and node.op == "call_function":
            program.graph.erase_node(node)


def one_token(program: Program) -> bool:
    """Whether each call of a graph brings one token of each sequence."""
    tokens = value(program.analysis(kv_sites)[0].new[0]).shape[2]
    return isinstance(tokens, int) and tokens == 1
