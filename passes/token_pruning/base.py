"""The base of passes that drop tokens between blocks: which blocks, how many stay, and what each layer's cache does then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.attention.spec.op import is_attention, set_spec, spec_of
from accelpass.ir.core.graph import value, written_inputs
from accelpass.ir.core.program import BLOCK, NAME, Program
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.sequence.removal import Rows, ShrinkingSequence
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import StepBlock, decoder_stack, recall_new, survived
from accelpass.ir.transform.tokens import (
    CannotCut,
    Stretch,
    decoder_blocks,
    ends_with,
    on_fewer,
    ready,
    stretches,
    take_over,
)
from accelpass.passes.core.base import Done, Record
from accelpass.passes.core.site_pass import claim
from accelpass.passes.core.staged import FULL, PolicyPass, Site, StagedCall
from accelpass.passes.kv_cache.base import NO_CACHE, cannot_store
from accelpass.passes.token_pruning.choice import best, importance_in, kept
from accelpass.passes.token_pruning.memory import Memory, computed
from accelpass.passes.token_pruning.rows_at_positions import RowsAtPositions, importance_of

NEW = "pruning.positions"
"""The value that holds the positions of a call's new tokens."""


@dataclass(frozen=True)
class TokenPruning(PolicyPass):
    """Drops tokens after some blocks of a decoder, by a score of each token for the last one.

    A prompt is one graph: the choice reads nothing back. A later step reads one number for each pruning block, how many tokens are
    taken up there, and runs the blocks on as many rows as are declared in ``sizes``.
    """

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    claims: ClassVar[dict[str, str]] = {"tokens": "each layer chooses the tokens that the next one reads"}
    reads_back: ClassVar[bool] = True
    for_prompts: ClassVar[bool] = True
    sizes: ClassVar[tuple[int, ...]] = (16, 64)
    """How many tokens blocks take up in one piece, besides a call's own number."""

    @abstractmethod
    def prunes(self, layers: int) -> dict[int, float]:
        """By number of the block after which tokens leave (never the last): the share of tokens that goes on.

        Raises:
            OptionError: it names a block that a model of so many layers does not have.
        """

    @abstractmethod
    def told(self, stretch: int, stretches: int) -> str:
        """What is done in one stretch of blocks, for the report."""

    def unfit(self, program: Program) -> str | None:
        """Why no token of this graph can be dropped, or None."""
        try:
            found = decoder_blocks(program)
        except CannotCut as cause:
            return str(cause)
        sites = program.analysis(kv_sites)
        attentions = [n for n in program.graph.nodes if is_attention(n)]
        if not attentions:
            return "no attention was recognised"
        if not sites and written_inputs(program.graph):
            return f"it writes to a cache of another kind: {NO_CACHE}"
        tokens = value(found[0].input).shape[1]
        if not sites and isinstance(tokens, int) and tokens == 1:
            return "one token at a time without an accelpass.KVCache: there is nothing to drop"
        for node in attentions:
            spec = spec_of(node)
            if spec.kind == "cross" or value(node).dim() != 4:
                return f"{spec.site}: its attention is not one of a decoder's tokens to each other"
            if spec.bias == "sliding_window" or (spec.window or 0):
                return f"{spec.site}: it sees a window of positions, which dropped tokens would leave holes in"
            if not sites and not (spec.causal or spec.bias == "causal") and not _masked(node):
                return f"{spec.site}: it is not causal, so no token stands for what is to come"
        for site in sites:
            why = cannot_store(site)
            if why is not None:
                return f"{site.path}: {why}"
        ends = self.prunes(len(found))
        if not ends:
            return "tokens can leave this graph nowhere"
        try:
            stretches(program, tuple(ends))
        except CannotCut as cause:
            return str(cause)
        return None

    # --- a prompt: one graph

    def apply(self, program: Program, record: Record) -> None:
        sites = program.analysis(kv_sites)
        is_prompt = not sites or sites[0].is_prompt
        if is_prompt:
            program.survivors = {}
        # What a pass before this one made of the graph may be cut; the graph of the calls to come was not.
        why = program.unfit.get(self.name) or self.unfit(program)
        if why is not None:
            record.skip("model", why)
            return
        keep = self.prunes(len(decoder_blocks(program)))
        before = set(program.graph.nodes)
        found = ready(program, tuple(keep))
        try:
            if is_prompt:
                self._prompt(program, found, tuple(keep.values()))
            else:
                self._later(program, found)
        except CannotCut as cause:
            if not is_prompt:
                raise
            for node in reversed(list(program.graph.nodes)):
                if node not in before:
                    program.graph.erase_node(node)
            record.skip("model", str(cause))
            return
        for stretch in found:
            shown = f"{stretch.blocks[0]} to {stretch.blocks[-1]}" if len(stretch.blocks) > 1 else stretch.blocks[0]
            record.take(shown, Done(self.told(stretch.number, len(found))))

    def _prompt(self, program: Program, found: Sequence[Stretch], keep: Sequence[float]) -> None:
        """All tokens of an empty context."""
        tokens, tables = value(found[0].start).shape[1], _tables(found)
        run = ShrinkingSequence(program, found)
        anchor, (every,) = run.anchor, run.make(_counted, found[0].start)
        chosen_rows, streams = [every], [run.stream]
        for stretch, share in zip(found[1:], keep, strict=True):
            importance = importance_in(program, run.attentions[-1], anchor)
            run.go_on(stretch, Rows(run.make(_choice(share), importance)[0]))
            assert run.rows is not None
            chosen_rows.append(run.rows)
            streams.append(run.stream)
        sites = program.analysis(kv_sites)
        run.finish()
        for stretch in found[1:]:
            survived(program, stretch.blocks[0], chosen_rows[stretch.number], tokens)
        if not sites:
            return
        memory = Memory(program, sites[0])
        for number, (source, dim) in enumerate(tables.items()):
            memory.tabulate(anchor, number, source, dim, every)
        for stretch in found[1:]:
            memory.put(anchor, f"hidden.{stretch.number}", chosen_rows[stretch.number - 1], streams[stretch.number - 1])
            memory.note(anchor, stretch.number, chosen_rows[stretch.number])
        for stretch in found:
            named = {}
            if stretch.number:
                (length,) = inserted(program, stretch.region[0], _length, found[0].start)
                named = {"rows": chosen_rows[stretch.number], "advance": length}
            self._store(program, stretch, named, stretch is found[-1])

    # --- later calls: blocks on rows, by the policy

    def stack(self, program: Program) -> Sequence[StepBlock]:
        sites = program.analysis(kv_sites)
        later = bool(sites) and not sites[0].is_prompt and self.unfit(program) is None
        return decoder_stack(program) if later else ()

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        first = min(self.prunes(len(blocks)))
        return [Site(block.path, block) for block in blocks[first + 1 :]]

    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        return [(on(size),) * len(paths) for size in self.sizes]

    def size(self, action: str) -> str:
        return "" if action == FULL else action

    def _later(self, program: Program, found: Sequence[Stretch]) -> None:
        """Let the blocks of later stretches compute the tokens that the policy names."""
        site = program.analysis(kv_sites)[0]
        memory = Memory(program, site)
        action = next(iter(set(program.actions.get(self.name, {}).values()) - {FULL}), FULL)
        count = None if action == FULL else int(action.split()[0])
        tables, known_axes, start, tail = _tables(found), program.analysis(axes), found[0].region[0], found[-1].end
        for stretch in found[1:]:
            if mixed := [n.name for n in stretch.rows if n not in tables]:
                raise CannotCut(f"{mixed[0]} mixes tokens, so its rows cannot be kept for later calls")
        last = start.prev
        (new,) = inserted(program, start, _positions, site.count, found[0].start)
        for number, (source, dim) in enumerate(tables.items()):
            memory.tabulate(start, number, source, dim, new)
        while (last := last.next) is not start:
            last.meta |= {BLOCK: -1, NAME: NEW if last is new else f"pruning.{last.name}"}
        ends_with(program, tail, memory.taken(tail.next, "out", new, tail))
        for stretch in reversed(found):
            rows, named = new, dict[str, fx.Node]()
            if stretch.number:
                rows, named = self._taken_up(program, stretch, memory, tables, count, known_axes)
            self._store(program, stretch, named, stretch is found[-1])
            after, mark = stretch.end.next, stretch.end.meta.pop(BLOCK, None)
            if stretch is not found[-1]:
                memory.put(after, f"hidden.{stretch.number + 1}", rows, stretch.end)
            memory.put(after, "out", rows, stretch.end)
            if mark is not None:
                after.prev.meta[BLOCK] = mark

    def _taken_up(
        self, program: Program, stretch: Stretch, memory: Memory, tables: Mapping[fx.Node, int], count: int | None,
        known_axes: Axes,
    ) -> tuple[fx.Node, dict[str, fx.Node]]:  # fmt: skip
        """Let a stretch compute tokens that the policy names, from the states that they were left with."""
        number, first, site = stretch.number, stretch.region[0], memory.first
        batch, tokens = value(stretch.start).shape[:2]
        rows = recall_new(program, f"positions:{number}", (batch, count or tokens), torch.int64)
        wanted = recall_new(program, f"wanted:{number}", (batch, site.capacity), torch.bool)
        advance = recall_new(program, f"advance:{number}", (), torch.int64)
        last = first.prev
        have = memory.note(first, number, rows)
        (keep,) = inserted(program, first, lambda wanted, have: [wanted & have[:, :-1]], wanted, have)
        given = {stretch.start: memory.taken(first, f"hidden.{number}", rows, stretch.start)}
        for at, (source, dim) in enumerate(tables.items()):
            if source in stretch.rows:
                given[source] = memory.looked_up(first, at, source, dim, rows)
        while (last := last.next) is not first:
            last.meta[NAME] = f"pruning.{number}.{last.name} on {count or tokens}"
        if count is None:
            for node in stretch.region:
                for outer, fewer in given.items():
                    node.replace_input_with(outer, fewer)
        else:
            with program.graph.inserting_before(first):
                made = on_fewer(stretch, given, count, known_axes)
            take_over(program, stretch, made, str(count))
        return rows, {"rows": rows, "advance": advance, "keep": keep}

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        ends = self.prunes(len(call.blocks))
        positions = call.value(NEW)
        tokens, counter = positions.shape[1], call.counter(0)
        left = total = call.held + tokens
        limits = [0, *(end + 1 for end in ends), len(call.blocks)]
        for number in range(limits[1]):
            call.run(number, FULL)
        wanted: Tensor | None = None
        for stretch, share in enumerate(ends.values(), 1):
            importance = importance_of(call.counter(limits[stretch] - 1))
            capacity = importance.shape[1]
            if wanted is None:
                wanted = torch.arange(capacity, device=importance.device).expand(importance.shape) < total
            left = kept(left, share)
            chosen = best(importance.masked_fill(wanted.logical_not(), float("-inf"))[:, :total], left)
            wanted = torch.zeros_like(wanted).scatter_(1, chosen, True)
            missing = wanted & computed(counter, stretch, capacity)[:, :-1].logical_not()
            # The one number that is read back: how many tokens are taken up.
            pieces = self.pieces(missing, int(missing.sum(1).max()), tokens)
            for at, (action, rows) in enumerate(pieces, 1):
                call.give(f"positions:{stretch}", rows)
                call.give(f"wanted:{stretch}", wanted)
                moved = tokens if at == len(pieces) else 0
                call.give(f"advance:{stretch}", torch.tensor(moved, device=rows.device))
                for number in range(limits[stretch], limits[stretch + 1]):
                    call.run(number, action)
            call.went_on(call.path(limits[stretch]), chosen, total)
        return call.results()

    def pieces(self, missing: Tensor, count: int, own: int) -> list[tuple[str, Tensor]]:
        """Positions to compute, ascending, in pieces of declared sizes, and the variant for each; the capacity stands for none.

        Args:
            missing: bool ``(batch, capacity)``; count: how many the sequence that misses most has.
            own: tokens of the call.
        """
        capacity = missing.shape[1]
        place = torch.where(missing, torch.arange(capacity, device=missing.device), -1)
        rows = place.sort(-1).values[:, capacity - count :]
        size = own if count == own else next((n for n in self.sizes if n >= count), self.sizes[-1])
        rows = torch.nn.functional.pad(rows, (-count % size, 0), value=-1)
        action = FULL if count == own else on(size)
        return [(action, piece.masked_fill(piece < 0, capacity)) for piece in rows.split(size, 1)]

    def _store(self, program: Program, stretch: Stretch, named: dict[str, fx.Node], last: bool) -> None:
        """Keep a stretch's tokens at their positions, and tell the storage which they are."""
        sites = {site.attention: site for site in kv_sites(program)}
        for node in stretch.attentions:
            site: KVSite | None = sites.get(node)
            if site is None:
                continue
            claim(program, self.name, self.edits, [site.path])
            scored = node is stretch.attentions[-1] and not last
            set_spec(node, spec_of(node).edited(by=self.name, store=RowsAtPositions(scored)))
            if named:
                give(site.append, named, {})


def on(size: int) -> str:
    """The variant in which a block computes so many tokens."""
    return f"{size} rows"


def _counted(stream: Tensor) -> list[Tensor]:
    return [torch.arange(stream.shape[1], device=stream.device).expand(stream.shape[0], -1).contiguous()]


def _length(stream: Tensor) -> list[Tensor]:
    return [torch.full((), stream.shape[1], dtype=torch.int64, device=stream.device)]


def _positions(count: Tensor, stream: Tensor) -> list[Tensor]:
    return [count[:, None] + torch.arange(stream.shape[1], device=count.device)]


def _choice(share: float) -> Callable[[Tensor], list[Tensor]]:
    return lambda importance: [best(importance, kept(importance.shape[1], share))]


def _tables(found: Sequence[Stretch]) -> dict[fx.Node, int]:
    """The tables that stretches read, in order, and their dimension of tokens."""
    return {node: dim for stretch in found for node, dim in stretch.tables().items()}


def _masked(node: fx.Node) -> bool:
    """A mask is computed from the call (padding), which HF gives causal models alone along with causality."""
    return bool(spec_of(node).before) and spec_of(node).bias == "tensor"
