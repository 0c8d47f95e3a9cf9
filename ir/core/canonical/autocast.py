"""Autocast resolved to casts at capture, so that passes see plain operators whose values have the dtypes they say.

Autocast is not part of a graph's operators: it is the state of the thread that runs them, and a region of the graph between
two calls that switch it. Each operator that it changes is replaced by casts of its operands and the operator itself.
What an operator's casts are is not looked up in a list: the operator is run once on fake tensors, and what autocast made
of it is seen below the dispatcher.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.core.graph import aten, call, fake_mode, placeholders, refresh, value
from accelpass.ir.errors import AccelpassError
from accelpass.ir.torch_private import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    tree_leaves,
)

AROUND = "accelpass_autocast"
"""Key of a graph module's ``meta``: the autocast state in which its caller calls it."""
_DEVICES = ("cpu", "cuda", "xpu", "mps")

State = Mapping[str, torch.dtype]
"""By device type, what autocast casts to there; a device on which it is off is missing."""


def current() -> dict[str, torch.dtype]:
    """The autocast state of this thread."""
    return {d: torch.get_autocast_dtype(d) for d in _DEVICES if torch.is_autocast_enabled(d)}


@contextlib.contextmanager
def switched(state: State) -> Iterator[None]:
    """Run under ``state`` and nothing else of what was on."""
    now = current()
    with contextlib.ExitStack() as stack:
        for device in {*now, *state}:
            if now.get(device) != state.get(device):
                on = device in state
                stack.enter_context(torch.autocast(device, state.get(device), enabled=on, cache_enabled=False))
        yield


class Unresolved(AccelpassError):
    """What autocast does inside an operator cannot be told from the graph."""


def unwrap(gm: fx.GraphModule) -> None:
    """Put an exported program's autocast regions, which are graphs of their own, into the graph, between two markers."""
    wrapped = torch.ops.higher_order.wrap_with_autocast
    for node in gm.graph.find_nodes(op="call_function", target=wrapped):
        switch, inner, operands = node.args[:4], node.args[4], node.args[5:]
        assert isinstance(inner, fx.Node)
        region = gm.get_submodule(str(inner.target))
        assert isinstance(region, fx.GraphModule)
        unwrap(region)
        with gm.graph.inserting_before(node):
            enter = gm.graph.call_function(ENTER_AUTOCAST, switch)
            copies = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=True))
            results = gm.graph.graph_copy(region.graph, copies)
            gm.graph.call_function(EXIT_AUTOCAST, (enter,))
        for item in list(node.users):
            item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
            gm.graph.erase_node(item)
        gm.graph.erase_node(node)
        gm.graph.erase_node(inner)
        gm.delete_submodule(str(inner.target))


def resolve(gm: fx.GraphModule, around: State) -> None:
    """Replace autocast regions, and what ``around`` does to the whole graph, by casts; values are those of autocast already.

    Raises:
        Unresolved: a region holds a control-flow operator, whose branches are graphs of their own.
    """
    if not around and not gm.graph.find_nodes(op="call_function", target=ENTER_AUTOCAST):
        return
    states: list[dict[str, torch.dtype]] = [dict(around)]
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is ENTER_AUTOCAST:
            device, dtype, enabled, _ = node.args
            inner = {d: t for d, t in states[-1].items() if d != device}
            if enabled:
                inner[device] = dtype or torch.get_autocast_dtype(device)
            states.append(inner)
        elif node.target is EXIT_AUTOCAST:
            states.pop()
            gm.graph.erase_node(node)
        elif states[-1]:
            _resolve(gm, node, states[-1])
    for node in reversed(gm.graph.find_nodes(op="call_function", target=ENTER_AUTOCAST)):
        gm.graph.erase_node(node)
    gm.recompile()


class _Seen(TorchDispatchMode):
    """The operators that run below autocast, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) for t in tree_leaves(made)):  # not what is asked of a tensor, its device for one
            self.calls.append((func, args, dict(kwargs or {}), made))
        return made


def _resolve(gm: fx.GraphModule, node: fx.Node, state: State) -> None:
    """Put the casts that ``state`` makes for one operator before it."""
    if isinstance(node.target, HigherOrderOperator):
        raise Unresolved(f"{node.target} inside an autocast region")
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return None  # autocast leaves operators that write to their operands alone
    trial = {n: t for n in node.all_input_nodes if (t := _trial(value(n))) is not None}
    if not any(t.is_floating_point() and t.device.type in state for t in trial.values()):
        return None
    inside, made = _run(node, trial, state)
    casts = _casts(inside, trial)
    twins = {n: t.to(casts[n]) if n in casts else t for n, t in trial.items()}
    try:
        outside, plain = _run(node, twins, {})
    except RuntimeError:  # dtypes that do not go together: what autocast casts is made inside the operator
        return _inline(gm, node, state)
    if _steps(inside, {id(trial[n]) for n in casts}) == _steps(outside, set()) and _dtypes(made) == _dtypes(plain):
        for operand, dtype in casts.items():
            with gm.graph.inserting_before(node):
                node.replace_input_with(operand, call(gm.graph, node, aten.to.dtype, operand, dtype))
        if casts:
            refresh(node)
        return None
    return _inline(gm, node, state)


def _trial(found: Any) -> Tensor | None:
    """An operand for a trial run, told apart from every other by its identity."""
    if not isinstance(found, Tensor):
        return None
    with found.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return torch.empty_like(found)


def _run(node: fx.Node, operands: Mapping[fx.Node, Tensor], state: State) -> tuple[_Seen, Any]:
    """What runs below autocast for ``node`` with these operands, and its results."""
    assert callable(node.target)
    swap = lambda n: operands.get(n, value(n))  # noqa: E731
    mode = next(iter(operands.values())).fake_mode  # type: ignore[attr-defined]
    seen = _Seen()
    with switched(state), mode, torch.no_grad(), seen:
        return seen, node.target(*fx.map_arg(node.args, swap), **fx.map_arg(node.kwargs, swap))


def _casts(seen: _Seen, memo: Mapping[fx.Node, Tensor]) -> dict[fx.Node, torch.dtype]:
    """The operands that were cast before anything else was done with them."""
    of = {id(t): n for n, t in memo.items()}
    found: dict[fx.Node, torch.dtype] = {}
    for func, args, kwargs, made in seen.calls:
        operand = of.get(id(args[0])) if args else None
        if func is aten._to_copy.default and operand is not None and set(kwargs) <= {"dtype"}:
            found.setdefault(operand, made.dtype)
    return found


def _steps(seen: _Seen, cast: set[int]) -> list[Any]:
    """The operators and the dtypes of their results, without the casts of the operands with these identities."""
    return [
        (func, _dtypes(made))
        for func, args, _, made in seen.calls
        if not (func is aten._to_copy.default and args and id(args[0]) in cast)
    ]


def _dtypes(made: Any) -> list[Any]:
    return [t.dtype for t in tree_leaves(made) if isinstance(t, Tensor)]


def _inline(gm: fx.GraphModule, node: fx.Node, state: State) -> None:
    """What runs below autocast, in place of the operator that contains it."""
    assert callable(node.target)
    given, target = list(node.all_input_nodes), node.target

    def run(*operands: Any) -> Any:
        swap = dict(zip(given, operands, strict=True)).__getitem__
        with switched(state):
            return target(*fx.map_arg(node.args, swap), **fx.map_arg(node.kwargs, swap))

    mode = fake_mode(gm)
    assert mode is not None
    with mode, torch.no_grad():
        # Sizes that the operator computes from those of its operands become nodes, too.
        traced = make_fx(run)(*(_trial(value(n)) if isinstance(value(n), Tensor) else value(n) for n in given))
    env: dict[fx.Node, Any] = dict(zip(placeholders(traced), given, strict=True))
    made: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            args, kwargs = fx.map_arg((inner.args, dict(inner.kwargs)), env.__getitem__)
            if inner.op == "output":
                made = args[0]
            elif inner.op == "call_function":
                function = inner.target
                if function is aten._to_copy.default and set(kwargs) == {"dtype"}:
                    function, args, kwargs = aten.to.dtype, (args[0], kwargs["dtype"]), {}
                env[inner] = call(gm.graph, node, function, *args, **kwargs)
            elif inner.op == "get_attr":
                raise Unresolved(f"{node.target}, which makes a tensor of its own, inside an autocast region")
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(made[user.args[1]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
