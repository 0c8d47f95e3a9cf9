"""Rows of an axis taken out of a graph: of every weight that has it, and of all that is computed from these.

Channels between two linears, heads with the keys that they share, experts, the width of the residual stream: whatever the axis
analysis follows. What is left is a graph of smaller tensors. Its weights are derived, so that they follow the model's own when
these are swapped or loaded anew.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axis
from accelpass.ir.attention.lowering.lower import like_in_memory, renew_origin
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, call, is_call, known, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import placed
from accelpass.ir.torch_private import tree_leaves
from accelpass.ir.transform.changed_axes import CannotShrink, ChangedAxes
from accelpass.ir.transform.kept import CHOSEN, Leaves, Merge, Numbered, Picked, Static, before_of, now_of, positions
from accelpass.ir.transform.shrink_rules import Change, Renumbered, Scaled, rule_for
from accelpass.ir.transform.splice import inserted

FORMAT = 1
"""Part of every recipe's key: raised when the same description would come to mean other rows."""


@dataclass(frozen=True)
class Shrunk:
    """A weight that became smaller: its path, and its shape before and after."""

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    bytes_before: int
    bytes_after: int


def shrink(
    program: Program, axis: Axis, keep: Static, region: Collection[fx.Node] | None = None, contest: bool = False
) -> list[Shrunk]:
    """Keep some rows of an axis, everywhere; returns the weights that became smaller.

    What sums over the axis (a product, a norm's mean) sums over the rows that are left, as a model that had been built with as
    many would. Other sizes may be symbolic.

    Args:
        axis: of ``program.analysis(axes)``.
        keep: the rows.
        region: the nodes to change, all of them by default. What they read of other nodes is cut to the rows that are kept.
        contest: let what compares the rows (a softmax, a choice of the largest) compare those that are left. What is picked by
            the numbers of rows so chosen has fewer rows, too.

    What is kept as :class:`~accelpass.ir.transform.kept.Numbered` needs a region. Numbers of rows that come into it are those of the
    whole axis, and what leaves it has all rows again. Of what is :class:`~accelpass.ir.transform.kept.Picked`, weights are cut as the
    graph runs, behind the node that picks.

    Raises:
        CannotShrink: something has the axis and cannot do with fewer rows; names the node. The graph is as it was.
    """
    surgery = _Surgery(program, axis, keep, None if region is None else frozenset(region), contest)
    surgery.follow()
    surgery.check_order()
    return surgery.commit()


def shrink_together(program: Program, parts: Sequence[tuple[Axis, Static, Collection[fx.Node] | None]]) -> list[Shrunk]:
    """Keep some rows of several axes, each in a region of its own: all, or none if one cannot; see :func:`shrink`.

    Raises:
        CannotShrink: see there.
    """
    surgeries = [_Surgery(program, a, keep, None if r is None else frozenset(r), False) for a, keep, r in parts]
    for surgery in surgeries:
        surgery.follow()
        surgery.check_order()
    return [told for surgery in surgeries for told in surgery.commit()]


class _Surgery:
    """One call of :func:`shrink`: what becomes of each node is found first (:meth:`follow`), and done once all can follow."""

    def __init__(
        self, program: Program, axis: Axis, keep: Static, region: frozenset[fx.Node] | None, contest: bool
    ) -> None:
        changing = self.changing = ChangedAxes(program, axis, keep.count)
        self.contest = contest
        self.axes, self.changed, self.size = changing.axes, changing.of, changing.size
        if keep.by.key[:1] == ("rows",) and keep.by.key[1][-1] >= axis.size:
            raise CannotShrink(f"row {keep.by.key[1][-1]} is kept, and the axis has {axis.size} rows, from 0")
        self.program, self.keep, self.region = program, keep, region
        self.values: dict[fx.Node, Any] = {}
        self.weights: dict[fx.Node, dict[int, Leaves]] = {}
        self.taken: dict[fx.Node, dict[int, Leaves]] = {}
        self.changes: dict[fx.Node, Change] = {}
        self.ends: dict[fx.Node, int] = {}

    # --- what becomes of each node

    def follow(self) -> None:
        """Find the new arguments and values of all nodes.

        Raises:
            CannotShrink: one cannot follow.
        """
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._source(node)
            elif node.op == "output":
                self._end(node)
            elif self.region is None or node in self.region:
                self._step(node)
            elif any(n in self.region and self._resized(n) for n in node.all_input_nodes):
                if is_call(node, aten._assert_tensor_metadata):  # an exported graph has them; they compute nothing
                    self._step(node)
                    continue
                if not self._is_restored():
                    raise CannotShrink(f"{node.name}, which is outside, reads the axis")
                self._leave(node)

    def _leave(self, node: fx.Node) -> None:
        """What a node outside reads has all rows again."""
        for given in (n for n in node.all_input_nodes if self.region and n in self.region and self._resized(n)):
            dims = self.changed(given)
            is_alone = all(len(leaves) == 1 and leaves[0][0] == CHOSEN for leaves in dims.values())  # type: ignore[index]
            if len(dims) != 1 or not (is_alone or isinstance(self.keep, Picked)):
                raise CannotShrink(f"{given.name}, which is read outside, has the axis among others")
            self.ends[given] = next(iter(dims))

    def _is_restored(self) -> bool:
        """Whether what is outside goes on reading all rows."""
        return self.keep.fill is not None

    def _resized(self, node: fx.Node) -> bool:
        """Whether what a node gives has another shape; of a tuple the analysis has no dimensions, so values tell."""
        return node in self.values and _shapes(self.values[node]) != _shapes(value(node))

    def renumbered(self, node: fx.Node) -> bool:
        """Whether a value holds numbers of rows that were chosen among those that are left."""
        chooser = self.changing.renumbered(node)
        return self.contest and chooser is not None and (self.region is None or chooser in self.region)

    def numbered(self, node: fx.Node) -> Renumbered | None:
        """Numbers of rows that come from outside; None where these may not name rows."""
        return Renumbered(node) if isinstance(self.keep, Numbered) else None

    def _source(self, node: fx.Node) -> None:
        dims = self.changed(node)
        if not dims or not node.users:
            return
        if self.region is not None and self.region.isdisjoint(node.users):
            return
        if not self.program.tensors.is_constant(node) or self.program.tensors.is_state(node):
            if self.region is None:
                raise CannotShrink(f"{node.name} has the axis in dimension {min(dims)}, and it is the caller's")
            return
        stale = [at for at, leaves in dims.items() if not known(value(node).shape[at] == before_of(leaves))]
        if stale:
            raise CannotShrink(f"{self.program.tensors.path(node)} was made smaller already")
        self._refuse_sums(dims)
        self.weights[node] = dims
        self.values[node] = self._smaller(value(node), dims)

    def _refuse_sums(self, dims: dict[int, Leaves]) -> None:
        if isinstance(self.keep, Merge) and any(len(leaves) > 1 or leaves[0][0] != CHOSEN for leaves in dims.values()):  # type: ignore[index]
            raise CannotShrink("rows that lie among others cannot be merged")

    def _end(self, node: fx.Node) -> None:
        for given in node.all_input_nodes:
            if self._resized(given) and (self.region is None or given in self.region):
                if self._is_restored() and self.region is not None:
                    self._leave(node)
                    continue
                raise CannotShrink(f"{given.name} has the axis, and the graph returns it")

    def _step(self, node: fx.Node) -> None:
        if self.region is not None:
            self._take_outer(node)
        reads = [n for n in node.all_input_nodes if n in self.values]
        dims = self.changed(node)
        if not reads and not dims:
            return
        change = Change(node, list(node.args), dict(node.kwargs), node.target, self)
        rule_for(node)(change)
        made = self._run(node, change)
        for held, wanted in zip(tree_leaves(made), self._wanted(node, made), strict=False):
            if isinstance(held, Tensor) and not all(known(a == b) for a, b in zip(held.shape, wanted, strict=True)):
                raise CannotShrink(f"{node.name} ({node.target}) gives {list(held.shape)} where {wanted} was expected")
        self.changes[node] = change
        if _layout(made) != _layout(value(node)):
            self.values[node] = made

    def _take_outer(self, node: fx.Node) -> None:
        assert self.region is not None
        for outer in node.all_input_nodes:
            if (
                outer in self.region
                or outer in self.values
                or (outer.op in ("placeholder", "get_attr") and self._is_weight(outer))
            ):
                continue
            dims = self.changed(outer)
            if dims:
                self._refuse_sums(dims)
                self.taken[outer] = dims
                self.values[outer] = self._smaller(value(outer), dims)

    def _is_weight(self, node: fx.Node) -> bool:
        return self.program.tensors.is_constant(node) and not self.program.tensors.is_state(node)

    def _wanted(self, node: fx.Node, made: Any) -> list[list[Any]]:
        """The shapes that the axes say, of a node with one tensor; of others what came out."""
        if isinstance(made, Tensor) and self.axes.of(node):
            return [[self.size(dim) for dim in self.axes.of(node)]]
        return [list(t.shape) if isinstance(t, Tensor) else [] for t in tree_leaves(made)]

    def now(self, given: Any) -> Any:
        """The fake value of a node afterwards, or what is given."""
        if isinstance(given, fx.Node):
            return self.values.get(given, value(given))
        return given.value if isinstance(given, Scaled | Renumbered) else given

    def _run(self, node: fx.Node, change: Change) -> Any:
        args, kwargs = _mapped(change.args, self.now), _mapped(change.kwargs, self.now)
        mode = getattr(next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None), "fake_mode", None)
        with torch.no_grad(), mode or getattr(value(node), "fake_mode", None) or nullcontext():
            try:
                made = change.target(*args, **kwargs)
            except Exception as cause:  # whatever an operator's fake says about operands that do not fit
                if is_call(node, aten.view):  # what lay in one piece may not any more
                    change.target = aten.reshape.default
                    return change.target(*args, **kwargs)
                raise CannotShrink(f"{node.name}: {str(cause).splitlines()[0]}") from cause
            if is_attention(node) and isinstance(made, Tensor):
                made = like_in_memory(made, value(node))  # what reads it was captured for that
        return made

    def _smaller(self, fake: Tensor, dims: dict[int, Leaves]) -> Tensor:
        """A value with fewer rows; the rows themselves do not matter for its shape."""
        with fake.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
            for at, leaves in dims.items():
                # A merged dimension may have a symbolic size, which is divided before it is multiplied.
                size = fake.shape[at] // before_of(leaves) * now_of(leaves)
                fake = fake.new_empty([size if d == at else s for d, s in enumerate(fake.shape)])
        return fake

    def check_order(self) -> None:
        """Refuse to cut what is read in front of the node that picks rows."""
        picked = self.keep.picked if isinstance(self.keep, Picked) else None
        early = next((n for n in self.changes if picked is not None and n < picked), None)
        if early is not None:
            raise CannotShrink(f"{early.name} has the axis, and is computed before its rows are picked")

    # --- and then it is done

    def commit(self) -> list[Shrunk]:
        """Change the graph; returns what became of the weights."""
        program, graph = self.program, self.program.graph
        made = {node: self._derived(node, dims) for node, dims in self.weights.items()}
        made |= {node: self._cut(node, dims) for node, dims in self.taken.items()}
        for node, change in self.changes.items():
            put = functools.partial(self._argument, node=node, made=made)
            node.target, node.args, node.kwargs = (
                change.target,
                tuple(_mapped(change.args, put)),
                _mapped(change.kwargs, put),
            )
            if node in self.values:
                node.meta["val"] = self.values[node]
        for node in self.changes:
            if is_attention(node):
                renew_origin(program, node)
        for node, dim in self.ends.items():
            self._restore(node, dim)
        for old, new in made.items():
            self.axes.dims[new] = self.axes.dims[old]
        graph.lint()
        return [self._told(old, made[old]) for old in self.weights]

    def _derived(self, weight: fx.Node, dims: dict[int, Leaves]) -> fx.Node:
        if isinstance(self.keep, Picked):
            return self._picked(weight, dims)
        sources = list(dict.fromkeys((weight, *self.keep.of)))
        at = [sources.index(n) for n in self.keep.of]
        recipe, keep = self.keep.by, self.keep

        def smaller(*given: Tensor) -> tuple[Tensor]:
            (chosen,) = recipe.fn(*(given[i] for i in at))
            return (keep.of_tensor(given[0], dims, chosen),)

        key = ("shrink", FORMAT, recipe.key, tuple(at), tuple(dims.items()))
        (made,) = self.program.tensors.derive(sources, Recipe(key, smaller, first=True), [f"{weight.name}_kept"])
        return made

    def _cut(self, outer: fx.Node, dims: dict[int, Leaves]) -> fx.Node:
        """The rows that are kept of a value that the region reads."""
        if isinstance(self.keep, Picked):
            return self._picked(outer, dims)
        anchor = self.keep.of or tuple(itertools.islice(self.weights, 1))
        keep, recipe = self.keep, getattr(self.keep, "outside", None) or self.keep.by
        first = min(n for n in self.changes if outer in n.all_input_nodes)
        node = outer
        for dim, leaves in dims.items():

            def at(*given: Tensor, leaves: Leaves = leaves) -> tuple[Tensor]:
                (chosen,) = recipe.fn(*(given if keep.of else ()))
                return (keep.between(leaves, *placed(given[0], [chosen])),)

            key = ("shrink.rows", FORMAT, recipe.key, leaves)
            (rows,) = self.program.tensors.derive(list(anchor), Recipe(key, at), [f"{outer.name}_rows"])
            cut = keep.cut(dim)
            (node,) = inserted(self.program, first, lambda *given, cut=cut: [cut(*given)], node, rows)
        return node

    def _picked(self, outer: fx.Node, dims: dict[int, Leaves]) -> fx.Node:
        """The rows of a weight, or of another value, that the graph picks."""
        keep = self.keep
        assert isinstance(keep, Picked) and keep.picked is not None
        first = min(n for n in self.changes if outer in n.all_input_nodes)
        cut = functools.partial(_cut_to, keep, dims)
        return inserted(self.program, first, cut, outer, keep.picked)[0]

    def _restore(self, node: fx.Node, dim: int) -> None:
        """Let what is outside read all rows, with a number in the place of those that are gone."""
        keep, size, leaves = self.keep, value(node).shape[dim], self.changed(node)[dim]
        assert keep.fill is not None
        fill, whole = keep.fill, self.axes.of(node)[dim].size
        rows = getattr(keep, "picked", None) or self._table(keep.by, f"{node.name}_rows")

        def restored(x: Tensor, rows: Tensor) -> list[Tensor]:
            assert x.shape[dim] == size
            # By a row of the fill behind the last: a tensor that is made here could not follow when its other sizes change.
            padded = torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, 1], value=fill)
            at, kept = torch.full((whole,), size, device=rows.device), positions(leaves, rows)
            return [padded.index_select(dim, at.index_copy(0, kept, torch.arange(size, device=rows.device)))]

        outside = [u for u in node.users if self.region is not None and u not in self.region]
        (made,) = inserted(self.program, node.next, restored, node, rows)
        for user in outside:
            user.replace_input_with(node, made)

    def _table(self, recipe: Recipe, name: str) -> fx.Node:
        """Numbers that no weight changes, beside the first weight that becomes smaller."""
        anchor = next(iter(self.weights))
        key = ("shrink.table", FORMAT, recipe.key)
        (made,) = self.program.tensors.derive(
            [anchor], Recipe(key, lambda weight: placed(weight, recipe.fn()), first=True), [name]
        )
        return made

    def _argument(self, given: Any, node: fx.Node, made: dict[fx.Node, fx.Node]) -> Any:
        if isinstance(given, Renumbered):
            assert isinstance(self.keep, Numbered) and self.keep.places is not None
            places = self._table(self.keep.places, f"{node.name}_places")
            (rows,) = inserted(self.program, node, lambda numbers, places: [places[numbers]], given.given, places)
            return rows
        if not isinstance(given, Scaled):
            return made.get(given, given) if isinstance(given, fx.Node) else given
        graph = node.graph
        with graph.inserting_before(node):
            size = call(graph, node, operator.floordiv, given.size, given.old)
            return call(graph, node, operator.mul, size, given.new)

    def _told(self, old: fx.Node, new: fx.Node) -> Shrunk:
        before, after = (tuple(int(s) for s in value(n).shape) for n in (old, new))
        sizes = [int(value(n).numel() * value(n).element_size()) for n in (old, new)]
        return Shrunk(self.program.tensors.path(old) or old.name, before, after, *sizes)


def _cut_to(keep: Static, dims: dict[int, Leaves], outer: Tensor, rows: Tensor) -> list[Tensor]:
    return [keep.of_tensor(outer, dims, rows)]


def _mapped(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of every leaf of nested lists, tuples and dicts."""
    if isinstance(tree, dict):
        return {k: _mapped(v, fn) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = [_mapped(v, fn) for v in tree]
        return mapped if isinstance(tree, list) else tuple(mapped)
    return fn(tree)


def _shapes(made: Any) -> list[str]:
    return [str(t.shape if isinstance(t, Tensor) else t) for t in tree_leaves(made)]


def _layout(made: Any) -> list[str]:
    """Shapes and strides, and sizes; symbolic ones by name, so that none is guarded on."""
    return [str((t.shape, t.stride()) if isinstance(t, Tensor) else t) for t in tree_leaves(made)]
