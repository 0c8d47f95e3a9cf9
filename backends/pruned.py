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

from accelpass.backends.pruned_graph import PrunedGraph, Run, Stage
from accelpass.backends.survivors import Survivors, keep_last
from accelpass.ir.derived import DERIVED, StateSpec
from accelpass.ir.kv.ledger import holding_of
from accelpass.ir.tokens import stream_name
from accelpass.passes.token_pruning.rows_at_positions import importance_state

LARGEST = 128
"""Tokens that are taken up in one piece by a graph of static sizes."""
SMALLEST = 16


@dataclass(eq=False)
class PrunedModel:
    """What Dynamo calls.

    Attributes:
        graph: for as many rows in each stretch as the graph was captured for, or the prompt's own.
        wider: makes a graph whose later stretches take this many rows; None if ``graph`` takes any number.
        keep: the share of tokens that goes on, by stretch before it.
        counts: positions of the layers' counters among the arguments; none without a KVCache.
        fresh: the cache is empty before the call.
        owner: position of one of the model's own tensors, or None.
    """

    graph: PrunedGraph
    wider: Callable[[int, Sequence[Any]], PrunedGraph] | None
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
        whole = stream
        survivors = []
        for number, share in enumerate(self.keep, 1):
            stage = self.graph.stages[number]
            if memory is not None:
                memory.put(number, rows, stream)
            chosen = best(run.importance(number - 1), kept(rows.shape[1], share))
            rows, stream = rows.gather(1, chosen), taken(stream, chosen)
            if memory is not None:
                memory.note(number, rows)
                if number == 1:
                    memory.tabulate(
                        self.graph.stages[1:], run, torch.arange(tokens, device=rows.device).expand(batch, tokens)
                    )
            given = {stream_name(number): stream, **run.rows_of(stage, rows)}
            given |= {f"positions:{number}": rows, f"advance:{number}": torch.tensor(tokens, device=rows.device)}
            stream = run.stage(number, given, rows.shape[1])
            if whole is run.ends[0]:
                whole = whole.clone()
            put(whole, rows, stream)
            survivors.append(Survivors(stage.path, rows, tokens))
        self.tell(args, survivors)
        return run.results({stream_name(len(self.keep) + 1): whole})

    def tell(self, args: Sequence[Any], survivors: Sequence[Survivors]) -> None:
        """Remember which tokens went on."""
        keep_last(None if self.owner is None else args[self.owner], survivors)

    def for_rows(self, count: int, args: Sequence[Any]) -> PrunedGraph:
        """A graph whose later stretches take ``count`` rows."""
        if self.wider is None or count == self.graph.tokens:
            return self.graph
        if count not in self._wider:
            self._wider[count] = self.wider(count, args)
        return self._wider[count]


def kept(tokens: int, share: float) -> int:
    """How many of so many tokens go on."""
    return max(1, int(share * tokens))


def best(importance: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` most important tokens, the last always, in their order: int64 ``(batch, count)``."""
    score = importance.clone()
    score[:, -1] = float("inf")
    return score.topk(count, -1).indices.sort(-1).values


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``(batch, tokens, channels)``."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def put(x: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write rows of ``(batch, tokens, channels)``."""
    x.scatter_(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]), new)


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
        return Memory(model, count, holding_of(count).capacity)

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
        put(self.hidden(number), rows, stream)

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
            new = made.movedim(dim, 1).expand(table.shape[0], rows.shape[1], *table.shape[2:])
            index = rows.reshape(*rows.shape, *[1] * (new.dim() - 2)).expand_as(new)
            table.scatter_(1, index, new)

    def rows(self, stage: Stage, run: Run, rows: Tensor) -> dict[str, Tensor]:
        """The inputs of a stretch that are rows of tables."""
        found = {}
        for name, what in stage.taken.items():
            like, dim = run.pinned(what.source), what.dims[0]
            table = self.table(what.source, like, dim)
            index = rows.reshape(*rows.shape, *[1] * (table.dim() - 2)).expand(*rows.shape, *table.shape[2:])
            found[name] = table.gather(1, index).movedim(1, dim)
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
        wanted = (torch.arange(memory.capacity, device=device) < total).expand(batch, memory.capacity)
        memory.tabulate(model.graph.stages[1:], run, new)
        memory.put(1, new, stream)
        whole, survivors = stream.clone(), []
        for number, share in enumerate(model.keep, 1):
            importance = self._importance(number - 1)
            importance[:, total - 1] = float("inf")
            wanted = _best(importance.masked_fill(wanted.logical_not(), float("-inf")), wanted, share)
            have = memory.have(number)
            missing = wanted & have[:, :-1].logical_not()
            # The one number that is read back: how many tokens are taken up.
            count = int(missing.sum(1).max())
            last = wanted[:, :total].sum(1).max()
            for rows in self._pieces(missing, count):
                memory.note(number, rows)
                have[:, -1] = False
                made = self._stretch(number, rows, wanted & have[:, :-1], tokens if rows is self._end else 0, run)
                if number < len(model.keep):
                    memory.put(number + 1, rows, made)
                inside = (rows >= self.before) & (rows < memory.capacity)
                if tokens == 1:
                    whole = made[:, -1:]
                else:
                    spare = torch.cat([whole, whole[:, :1]], 1)
                    put(spare, torch.where(inside, rows - self.before, tokens), made)
                    whole = spare[:, :-1]
            survivors.append(Survivors(model.graph.stages[number].path, _listed(wanted, int(last)), total))
        model.tell(self.args, survivors)
        return run.results({stream_name(len(model.keep) + 1): whole})

    def _pieces(self, missing: Tensor, count: int) -> list[Tensor]:
        """Positions to compute, ascending, at most so many at a time as one graph takes; the capacity stands for none."""
        capacity = self.memory.capacity
        place = torch.where(missing, torch.arange(capacity, device=missing.device), -1)
        rows = place.sort(-1).values[:, capacity - count :]
        if self.model.wider is not None and count != self.model.graph.tokens:
            # Static sizes: a graph for each power of two.
            size = min(LARGEST, max(SMALLEST, 1 << (count - 1).bit_length()))
            rows = torch.nn.functional.pad(rows, (-count % size, 0), value=-1)
        else:
            size = count
        pieces = [piece.masked_fill(piece < 0, capacity) for piece in rows.split(size, 1)]
        self._end = pieces[-1]
        return pieces

    def _stretch(self, number: int, rows: Tensor, keep: Tensor, advance: int, run: Run) -> Tensor:
        """Compute these tokens in one stretch; returns the stream after it."""
        graph = self.model.for_rows(rows.shape[1], self.args)
        mine = run if graph is self.model.graph else graph.begin(self.args, run.values)
        given = {stream_name(number): taken(self.memory.hidden(number), rows), f"positions:{number}": rows}
        given |= {f"keep:{number}": keep, f"advance:{number}": torch.tensor(advance, device=rows.device)}
        given |= self.memory.rows(graph.stages[number], run, rows)
        made: Tensor = mine.stage(number, given, rows.shape[1])
        return made

    def _importance(self, number: int) -> Tensor:
        """What the last query gave to each position, as the last scored layer of a stretch wrote it."""
        count = self.args[self.model.graph.stages[number].count]
        held = DERIVED.get([count], importance_state(self.memory.capacity).recipe()).tensors[0]
        return held.clone()


def _best(importance: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Which of the wanted tokens go on: for each sequence the best ``max(1, int(share * wanted))``."""
    count = (wanted.sum(1, keepdim=True).double() * share).long().clamp_min(1)
    rank = importance.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return wanted & (rank < count)


def _listed(wanted: Tensor, most: int) -> Tensor:
    """Positions of True, ascending, -1 in front of shorter rows."""
    place = torch.where(wanted, torch.arange(wanted.shape[1], device=wanted.device), -1)
    return place.sort(-1).values[:, wanted.shape[1] - most :]
