"""A small pattern language over canonical graphs, for passes and analyses.

A pattern proves structure only; whether a rewrite may be used is the rewrite's own business. When nothing matches, the
result says how far the pattern got and what stood in the way.

    x = Any("x")
    silu = OneOf(Op(aten.silu, x), Op(aten.mul, x, Op(aten.sigmoid, x), commutes=True))
    found = match(Op(aten.mul, Capture("act", silu), Any("up"), commutes=True), node)
    if isinstance(found, Match):
        found["up"]            # an fx.Node
    else:
        found.why              # "mul: no order of operands fits: ..."
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

from torch import fx

from accelpass.ir.core.graph import is_call


@dataclass(frozen=True)
class Match:
    """A pattern that fits: captures by name, and the nodes inside."""

    root: fx.Node
    captures: dict[str, typing.Any]
    nodes: frozenset[fx.Node]

    def __getitem__(self, name: str) -> typing.Any:
        return self.captures[name]


@dataclass(frozen=True)
class WhyNot:
    """A pattern that does not fit: the deepest reason, in words, and the node at which it was seen."""

    why: str
    at: object
    depth: int = 0

    def __bool__(self) -> bool:
        return False


Result = Match | WhyNot


@dataclass(frozen=True)
class Pattern:
    """Base of patterns."""

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        """Nodes inside the pattern, adding to ``captures``; or why it does not fit. A failure may leave captures."""
        raise TypeError(f"{type(self).__name__} does not define check()")


@dataclass(frozen=True)
class Any(Pattern):
    """Anything, captured under ``name``; the same name twice must be the same thing. ``where`` may refuse with words."""

    name: str
    kind: type | tuple[type, ...] = object
    where: Callable[[typing.Any], str | None] = lambda _: None

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        if not isinstance(value, self.kind):
            wanted = self.kind if isinstance(self.kind, tuple) else (self.kind,)
            names = " or ".join(k.__name__ for k in wanted)
            return WhyNot(f"{self.name} is {_told(value)}; it should be a {names}", value, depth)
        if self.name in captures and captures[self.name] is not value and captures[self.name] != value:
            return WhyNot(
                f"{self.name} is {_told(value)} here and {_told(captures[self.name])} elsewhere", value, depth
            )
        refused = self.where(value)
        if refused:
            return WhyNot(f"{self.name}: {refused}", value, depth)
        captures[self.name] = value
        return []


@dataclass(frozen=True)
class Const(Pattern):
    """A literal; floats to a relative 1e-6."""

    wanted: typing.Any

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        if isinstance(self.wanted, float) and isinstance(value, int | float):
            same = abs(value - self.wanted) <= 1e-6 * max(1.0, abs(self.wanted))
        else:
            same = value == self.wanted
        return [] if same else WhyNot(f"{_told(value)} is not {self.wanted!r}", value, depth)


@dataclass(frozen=True, init=False)
class Op(Pattern):
    """A call of ``target`` (an overload or a packet; several in a tuple) with operands that fit.

    Operands that the pattern does not list are ignored. With ``commutes`` the first two may come in either order.
    ``users`` limits how many users the node may have (1: nobody else sees the value).
    """

    targets: tuple[typing.Any, ...]
    operands: tuple[Pattern, ...]
    commutes: bool = False
    users: int | None = None

    def __init__(self, target: typing.Any, *operands: Pattern, commutes: bool = False, users: int | None = None):
        object.__setattr__(self, "targets", target if isinstance(target, tuple) else (target,))
        object.__setattr__(self, "operands", operands)
        object.__setattr__(self, "commutes", commutes)
        object.__setattr__(self, "users", users)

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        if not is_call(value, *self.targets):
            return WhyNot(f"{_told(value)} is not a call of {' or '.join(map(_name, self.targets))}", value, depth)
        node = typing.cast(fx.Node, value)
        if self.users is not None and len(node.users) > self.users:
            return WhyNot(f"{node.name} has {len(node.users)} users; at most {self.users} may see it", node, depth)
        if len(node.args) < len(self.operands):
            return WhyNot(f"{node.name} has {len(node.args)} operands; {len(self.operands)} are needed", node, depth)
        worst: WhyNot | None = None
        for order in permutations(self.operands[:2]) if self.commutes else [self.operands[:2]]:
            trial, inside = dict(captures), [node]
            for pattern, operand in zip((*order, *self.operands[2:]), node.args, strict=False):
                found = pattern.check(operand, trial, depth + 1)
                if isinstance(found, WhyNot):
                    worst = found if worst is None or found.depth > worst.depth else worst
                    break
                inside += found
            else:
                captures.update(trial)
                return inside
        assert worst is not None
        return WhyNot(f"{node.name}: {worst.why}", worst.at, worst.depth)


@dataclass(frozen=True)
class Capture(Pattern):
    """What fits ``inner``, captured under ``name``."""

    name: str
    inner: Pattern

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        found = self.inner.check(value, captures, depth)
        if not isinstance(found, WhyNot):
            captures[self.name] = value
        return found


@dataclass(frozen=True, init=False)
class OneOf(Pattern):
    """Several spellings of one idea; the first that fits is taken."""

    spellings: tuple[Pattern, ...]

    def __init__(self, *spellings: Pattern):
        object.__setattr__(self, "spellings", spellings)

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        reasons = []
        for spelling in self.spellings:
            trial = dict(captures)
            found = spelling.check(value, trial, depth)
            if not isinstance(found, WhyNot):
                captures.update(trial)
                return found
            reasons.append(found)
        return max(reasons, key=lambda r: r.depth)


@dataclass(frozen=True)
class Maybe(Pattern):
    """``wrapper`` around ``inner`` or ``inner`` alone: a cast, a dropout, a view that may be there or not.

    ``wrapper`` is a target whose first operand is passed on; it may stand there several times.
    """

    wrapper: typing.Any
    inner: Pattern

    def check(self, value: object, captures: dict[str, typing.Any], depth: int) -> WhyNot | list[fx.Node]:
        wrappers = self.wrapper if isinstance(self.wrapper, tuple) else (self.wrapper,)
        inside: list[fx.Node] = []
        while True:
            trial = dict(captures)
            found = self.inner.check(value, trial, depth)
            if not isinstance(found, WhyNot):
                captures.update(trial)
                return inside + found
            if not is_call(value, *wrappers):
                return found
            node = typing.cast(fx.Node, value)
            inside.append(node)
            value = node.args[0]


@dataclass
class Search:
    """All matches in a graph, and the reasons of the near misses: roots that fit while something deeper did not."""

    matches: list[Match] = field(default_factory=list)
    near_misses: list[WhyNot] = field(default_factory=list)


def match(pattern: Pattern, node: fx.Node) -> Result:
    """Whether ``pattern`` fits with ``node`` as its root."""
    captures: dict[str, typing.Any] = {}
    found = pattern.check(node, captures, 0)
    return found if isinstance(found, WhyNot) else Match(node, captures, frozenset(found))


def search(pattern: Pattern, graph: fx.Graph) -> Search:
    """Matches in graph order; a node inside one match is not inside another."""
    done, taken = Search(), set[fx.Node]()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node in taken:
            continue
        found = match(pattern, node)
        if isinstance(found, WhyNot):
            if found.depth > 0:
                done.near_misses.append(found)
        elif not taken & found.nodes:
            taken |= found.nodes
            done.matches.append(found)
    done.matches.reverse()
    done.near_misses.reverse()
    return done


def _told(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"{value.name} ({_name(value.target) if value.op == 'call_function' else value.op})"
    return repr(value)


def _name(target: object) -> str:
    return str(target).removeprefix("aten.")
