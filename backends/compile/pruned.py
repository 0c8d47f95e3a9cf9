"""A decoder as stretches of blocks that run on fewer and fewer tokens, and what its steps keep for later ones.

The algorithm is LazyLLM's (arXiv 2407.14057, section 3): a step wants all tokens of the context; at each pruning block those
that the last token attends to least are dropped; wanted tokens that a stretch has not seen yet are taken up from the hidden
state that they had in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.compile.pruned_graph import PrunedGraph, Run, Stage
from accelpass.backends.runtime.survivors import Survivors, keep_last
from accelpass.ir.core.derived import DERIVED, StateSpec
from accelpass.ir.kv.ledger import holding_of
from accelpass.ir.transform.rows import rows_of, write_rows
from accelpass.ir.transform.tokens import stream_name
from accelpass.passes.token_pruning.rows_at_positions import importance_state

LARGEST = 128
"""Tokens that are taken up in one piece by a graph of static sizes."""
SMALLEST = 16


@dataclass(eq=False)
class PrunedModel:
    """What Dynamo calls.

    Attributes:
        graph: for as many rows in each stretch as the graph was captured for, or the prompt's own.
        wider: makes, for a call, a graph whose later stretches take this many rows; None if ``graph`` takes any number.
        keep: the share of tokens that goes on, by stretch before it.
        counts: positions of the layers' counters among the arguments; none without a KVCache.
        fresh: the cache is empty before the call.
        owner: position of one of the model's own tensors, or None.
    """

    graph: PrunedGraph
    wider: Callable[[Sequence[Any], int], PrunedGraph] | None
    keep: tuple[float, ...]
    counts: tuple[int, ...]
    fresh: bool
    owner: int | None
    _wider: dict[int, PrunedGraph] = field(default_factory=dict)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self.counts and not self.fresh:
            return _Step(self, args).run()
        return self._prompt(args)

    def _prompt(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """All tokens of an empty context."""
        run = self.graph.begin(args)
        stream = run.stage(0, {})
        batch, tokens = stream.shape[:2]
        rows = torch.arange(tokens, device=stream.device).expand(batch, tokens)
        memory = Memory.of(self, args)
        whole, survivors = stream.clone(), []
        for number, share in enumerate(self.keep, 1):
            stage = self.graph.stages[number]
            if memory is not None:
                memory.put(number, rows, stream)
            chosen = best(run.importance(number - 1), kept(rows.shape[1], share))
            rows, stream = rows.gather(1, chosen), rows_of(stream, chosen)
            if memory is not None:
                memory.note(number, rows)
                if number == 1:
                    memory.tabulate(
                        self.graph.stages[1:], run, torch.arange(tokens, device=rows.device).expand(batch, tokens)
                    )
            given = {stream_name(number): stream, **run.rows_of(stage, rows)}
            given |= {f"positions:{number}": rows, f"advance:{number}": torch.tensor(tokens, device=rows.device)}
            stream = run.stage(number, given, rows.shape[1])
            write_rows(whole, rows, stream)
            survivors.append(Survivors(stage.path, rows, tokens))
        self.tell(args, survivors)
        return run.results({stream_name(len(self.keep) + 1): whole})

    def tell(self, args: Sequence[Any], survivors: Sequence[Survivors]) -> None:
        """Remember which tokens went on."""
        keep_last(None if self.owner is None else args[self.owner], survivors)

    def for_rows(self, args: Sequence[Any], count: int) -> PrunedGraph:
        """A graph whose later stretches take ``count`` rows."""
        if self.wider is None or count == self.graph.tokens:
            return self.graph
        if count not in self._wider:
            self._wider[count] = self.wider(args, count)
        return self._wider[count]


def kept(tokens: int, share: float) -> int:
    """How many of so many tokens go on."""
    return max(1, int(share * tokens))


def best(importance: Tensor, count: int) -> Tensor:
    """The ``count`` most important tokens, the last always, of equal ones the first; ascending int64 ``(batch, count)``."""
    score = importance.clone()
    score[:, -1] = float("inf")
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


@dataclass(eq=False)
class Memory:
    """What the steps on one cache keep besides keys and values, as state of the first layer's counter.

    ``hidden`` of a stretch are the states in front of it, ``have`` the tokens that it has computed, a table the rows of a
    value that is computed for each token by itself (rotary embeddings). Each has a row for no token after those of the
    capacity.
    """

    model: PrunedModel
    count: Tensor
    capacity: int

    @staticmethod
    def of(model: PrunedModel, args: Sequence[Any]) -> Memory | None:
        if not model.counts:
            return None
        count = args[model.counts[0]]
        return Memory(model, count, holding_of(count).room)

    def _state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        spec = StateSpec(f"pruning.{name}", (self.capacity + 1, *shape), dtype, "sequence", batched=True)
        held: Tensor = DERIVED.get([self.count], spec.recipe()).tensors[0]
        return held

    def hidden(self, number: int) -> Tensor:
        graph = self.model.graph
        return self._state(f"hidden.{number}", (graph.width,), graph.dtype)

    def have(self, number: int) -> Tensor:
        return self._state(f"have.{number}", (), torch.bool)

    def put(self, number: int, rows: Tensor, stream: Tensor) -> None:
        """States in front of a stretch."""
        write_rows(self.hidden(number), rows, stream)

    def note(self, number: int, rows: Tensor) -> None:
        """A stretch has computed these tokens."""
        self.have(number).scatter_(1, rows, True)

    def table(self, source: int, like: Tensor, dim: int) -> Tensor:
        row = [s for i, s in enumerate(like.shape) if i not in (0, dim)]
        return self._state(f"table.{source}", row, like.dtype)

    def tabulate(self, stages: Sequence[Stage], run: Run, rows: Tensor) -> None:
        """Keep the rows of these tokens of every table that a stretch reads."""
        for source, dim in {(t.source, t.dims[0]) for s in stages for t in s.taken.values() if t.is_table}:
            made = run.pinned(source)
            table = self.table(source, made, dim)
            write_rows(table, rows, made.movedim(dim, 1).expand(table.shape[0], rows.shape[1], *table.shape[2:]))

    def rows(self, stage: Stage, run: Run, rows: Tensor) -> dict[str, Tensor]:
        """The inputs of a stretch that are rows of tables."""
        found = {}
        for name, what in stage.taken.items():
            like, dim = run.pinned(what.source), what.dims[0]
            found[name] = rows_of(self.table(what.source, like, dim), rows).movedim(1, dim).contiguous()
        return found


class _Step:
    """One call on a context that holds tokens already."""

    def __init__(self, model: PrunedModel, args: Sequence[Any]) -> None:
        self.model, self.args = model, args
        memory = Memory.of(model, args)
        assert memory is not None
        self.memory = memory
        self.before = holding_of(memory.count).tokens

    def run(self) -> tuple[Any, ...]:
        model, memory = self.model, self.memory
        run = model.graph.begin(self.args)
        stream = run.stage(0, {})
        batch, tokens = stream.shape[:2]
        device, total = stream.device, self.before + tokens
        new = torch.arange(self.before, total, device=device).expand(batch, tokens)
        wanted = torch.arange(memory.capacity, device=device).expand(batch, -1) < total
        memory.tabulate(model.graph.stages[1:], run, new)
        memory.put(1, new, stream)
        # One row more, for what is computed of tokens of earlier calls.
        whole, survivors, left = torch.cat([stream, stream[:, :1]], 1), [], total
        for number, share in enumerate(model.keep, 1):
            left = kept(left, share)
            importance = self._importance(number - 1).masked_fill(wanted.logical_not(), float("-inf"))
            chosen = best(importance[:, :total], left)
            wanted = torch.zeros_like(wanted).scatter_(1, chosen, True)
            have = memory.have(number)
            missing = wanted & have[:, :-1].logical_not()
            # The one number that is read back: how many tokens are taken up.
            pieces = self._pieces(missing, int(missing.sum(1).max()))
            for at, rows in enumerate(pieces, 1):
                memory.note(number, rows)
                have[:, -1] = False
                made = self._stretch(number, rows, wanted & have[:, :-1], tokens if at == len(pieces) else 0, run)
                if number < len(model.keep):
                    memory.put(number + 1, rows, made)
                inside = (rows >= self.before) & (rows < memory.capacity)
                write_rows(whole, torch.where(inside, rows - self.before, tokens), made)
            survivors.append(Survivors(model.graph.stages[number].path, chosen, total))
        model.tell(self.args, survivors)
        return run.results({stream_name(len(model.keep) + 1): whole[:, :tokens].contiguous()})

    def _pieces(self, missing: Tensor, count: int) -> list[Tensor]:
        """Positions to compute, ascending, in pieces of as many as one graph takes; the capacity stands for none.

        Args:
            count: how many the sequence that misses most has.
        """
        capacity = self.memory.capacity
        place = torch.where(missing, torch.arange(capacity, device=missing.device), -1)
        rows = place.sort(-1).values[:, capacity - count :]
        if self.model.wider is not None and count != self.model.graph.tokens:
            # Static sizes: a graph for each power of two.
            size = min(LARGEST, max(SMALLEST, 1 << (count - 1).bit_length()))
            rows = torch.nn.functional.pad(rows, (-count % size, 0), value=-1)
        else:
            size = count
        return [piece.masked_fill(piece < 0, capacity) for piece in rows.split(size, 1)]

    def _stretch(self, number: int, rows: Tensor, keep: Tensor, advance: int, run: Run) -> Tensor:
        """Compute these tokens in one stretch; returns the stream after it."""
        graph = self.model.for_rows(self.args, rows.shape[1])
        mine = run if graph is self.model.graph else graph.begin(self.args, run.values)
        given = {stream_name(number): rows_of(self.memory.hidden(number), rows), f"positions:{number}": rows}
        given |= {f"keep:{number}": keep, f"advance:{number}": torch.tensor(advance, device=rows.device)}
        given |= self.memory.rows(graph.stages[number], run, rows)
        made: Tensor = mine.stage(number, given, rows.shape[1])
        return made

    def _importance(self, number: int) -> Tensor:
        """What the last query gave to each position, as the last scored layer of a stretch wrote it."""
        count = self.args[self.model.graph.stages[number].count]
        held: Tensor = DERIVED.get([count], importance_state(self.memory.capacity).recipe()).tensors[0]
        return held
