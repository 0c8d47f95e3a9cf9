"""What a mask is, where its values can be computed while compiling; unknown masks stay ``tensor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from accelpass.ir.attention.recognition.effects import writes
from accelpass.ir.attention.spec.spec import AttentionSpec, Step
from accelpass.ir.core.graph import aten, draws, is_call, known, through, value
from accelpass.ir.torch_private import tree_leaves, tree_map_only

_LAYOUT = (
    *(aten.to, aten._to_copy, aten.type_as, aten.view, aten.reshape, aten.squeeze, aten.unsqueeze, aten.expand),
    *(aten.repeat, aten.repeat_interleave, aten.slice, aten.contiguous, aten.clone, aten.transpose, aten.permute),
)
_SAME = (aten.to, aten._to_copy, aten.expand, aten.contiguous, aten.clone, aten.alias)
"""What leaves the places of queries and keys in a mask alone."""
_AND = (aten.__and__, aten.bitwise_and, aten.logical_and)
_MOST_NODES = 200
_MOST_TOKENS = 4096
_END = 2**31  # a slice up to the end has a number beyond this
_HIDDEN = -1e4  # an additive mask hides a key with at most this


def bias_of(spec: AttentionSpec, extras: Sequence[fx.Node], rows: Any, columns: Any) -> tuple[str, int | None]:
    """(one of BIAS_KINDS, window). A mask is named if it is the only one and depends on nothing but positions.

    ``alibi`` says that a bias grows with position; masks beside it stay steps without a name.
    """
    if any(s.kind == "add" and s.extra is not None and is_alibi(extras[s.extra]) for s in spec.steps):
        return "alibi", None
    steps = [s for s in spec.steps if s.kind != "sink" and s.extra is not None]
    if not steps:
        return ("causal" if spec.causal else "none"), None
    if len(steps) != 1 or spec.causal:
        return "tensor", None
    (step,) = steps
    assert step.extra is not None
    if all(isinstance(n, int) for n in (rows, columns)) and max(rows, columns) <= _MOST_TOKENS:
        return _named(step, constant(extras[step.extra]), rows, columns)
    return _named_at_a_few_sizes(step, extras[step.extra], rows, columns)


def _named_at_a_few_sizes(step: Step, mask: fx.Node, rows: Any, columns: Any) -> tuple[str, int | None]:
    """The name of a mask over a symbolic number of tokens, or one too large to compute: what it is at numbers that tell.

    A mask of positions can change its kind only where the number of tokens passes a constant of its own (a window), so
    it is computed on both sides of all of them; a number of tokens that is known has passed them.
    """
    if not known(rows == columns):
        return "tensor", None
    tokens = rows.node.expr if isinstance(rows, torch.SymInt) else rows
    if isinstance(tokens, sympy.Expr) and not tokens.is_Symbol:
        return "tensor", None
    symbols, most = _symbols_and_constants(mask, tokens)
    found = set()
    for fewer in (*(() if isinstance(tokens, int) else (3,)), 2 * most + 5, 3 * most + 10):
        if fewer > _MOST_TOKENS:
            return "tensor", None
        sizes: dict[Any, int] = {**dict.fromkeys(symbols, 2), tokens: fewer}
        found.add(_named(step, constant(mask, sizes), fewer, fewer))
    return found.pop() if len(found) == 1 else ("tensor", None)


def _symbols_and_constants(mask: fx.Node, tokens: Any) -> tuple[set[sympy.Symbol], int]:
    """The symbolic sizes that a node depends on, and the largest constant that is neither "up to the end" nor ``tokens``."""
    symbols: set[sympy.Symbol] = set()
    constants = [1]
    seen: set[fx.Node] = set()
    front = [mask]
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        size = value(node)
        if isinstance(size, torch.SymInt):
            symbols |= size.node.expr.free_symbols
            constants += [abs(int(n)) for n in size.node.expr.atoms(sympy.Integer)]
            continue
        constants += [abs(a) for a in tree_leaves((node.args, node.kwargs)) if type(a) is int]
        front.extend(node.all_input_nodes)
    return symbols, max(n for n in constants if n < _END and n != tokens)


def _named(step: Step, mask: Tensor | None, rows: int, columns: int) -> tuple[str, int | None]:
    """The name of a mask whose values are known."""
    seen = None if mask is None else _seen(step, mask)
    if seen is None:
        return "tensor", None
    try:
        seen = seen.expand(*seen.shape[:-2], rows, columns).reshape(-1, rows, columns)
    except RuntimeError:
        return "tensor", None
    if bool(seen.all()):
        return "none", None
    if not bool((seen == seen[0]).all()):
        return "tensor", None
    behind = (torch.arange(rows) + columns - rows).unsqueeze(-1) - torch.arange(columns)
    if torch.equal(seen[0], behind >= 0):
        return "causal", None
    visible = behind[seen[0]]
    window = int(visible.max()) + 1 if visible.numel() else 0
    if window and torch.equal(seen[0], (behind >= 0) & (behind < window)):
        return "sliding_window", window
    return "tensor", None


def _seen(step: Step, mask: Tensor) -> Tensor | None:
    """Which keys a mask lets through, if that is all that it does."""
    if step.kind == "keep":
        return mask.bool()
    if step.kind == "fill":
        return mask.logical_not()
    if step.kind == "add":
        seen = mask > _HIDDEN
        return None if bool((mask[seen] != 0).any()) else seen
    return None


def is_causal_but_for_padding(spec: AttentionSpec, extras: Sequence[fx.Node], rows: Any, columns: Any) -> bool:
    """Whether a mask is one that is causal AND others that say of each key alone whether it is there, whatever the query.

    Whatever the caller says of keys, no query sees a later one then; and a mask of windows, or of several texts in one, is none.
    """
    steps = [s for s in spec.before if s.extra is not None]
    if len(steps) != 1 or steps[0].kind not in ("keep", "add") or steps[0].other is not None or spec.causal:
        return False
    (step,) = steps
    assert step.extra is not None
    mask = through(extras[step.extra], *_SAME)
    if step.kind == "add":  # 0 where the condition holds, and what hides a key elsewhere
        if not is_call(mask, aten.where) or len(mask.args) != 3:
            return False
        shown, hidden = (constant(a) if isinstance(a, fx.Node) else torch.tensor(a) for a in mask.args[1:])
        if shown is None or hidden is None or bool((shown != 0).any()) or bool((hidden > _HIDDEN).any()):
            return False
        mask = mask.args[0]
    elif float(step.value) > _HIDDEN:
        return False
    named = set()
    front = [mask]
    while front:
        part = front.pop()
        while is_call(part, *_SAME) and value(part.args[0]).dtype == torch.bool:
            part = part.args[0]
        if not isinstance(part, fx.Node) or not isinstance(value(part), Tensor) or value(part).dtype != torch.bool:
            return False
        if is_call(part, *_AND):
            front += part.args[:2]
            continue
        alone = AttentionSpec(steps=(Step("keep", extra=0, value=float("-inf")), Step("softmax")))
        name, _ = bias_of(alone, [part], rows, columns)
        of_keys = (
            value(part).dim() > 1 and known(value(part).shape[-2] == 1) and known(value(part).shape[-1] == columns)
        )
        if name not in ("none", "causal") and not (name == "tensor" and of_keys and constant(part) is None):
            return False
        named.add(name)
    return "causal" in named


def shows_all_held(step: Step, mask: fx.Node, counts: Sequence[fx.Node], capacity: int) -> bool:
    """Whether a mask lets one new token see all that a cache holds, and itself: it says nothing that the cache does not.

    Args:
        counts: the graph inputs that count what the cache's layers hold, each the same number.
        capacity: rows of the cache; the new token takes the first that is free.
    """
    for held in {0, min(1, capacity - 1), capacity // 2, capacity - 1}:
        found = constant(mask, given={count: torch.full(value(count).shape, held) for count in counts})
        seen = None if found is None else _seen(step, found)
        if seen is None or seen.shape[-1] != capacity:
            return False
        if not bool((seen == (torch.arange(capacity) <= held)).all()):
            return False
    return True


def is_alibi(bias: fx.Node) -> bool:
    """True for slopes times positions (Press et al. 2022, section 3): one slope a head, none larger than 1."""
    product = through(bias, *_LAYOUT)
    if not is_call(product, aten.mul) or not all(isinstance(n, fx.Node) for n in product.args[:2]):
        return False
    for slopes, positions in (product.args[:2], product.args[1::-1]):
        found = constant(slopes)
        if found is None or not found.is_floating_point() or found.numel() < 2 or max(found.shape) != found.numel():
            continue
        size = found.abs().flatten()
        if bool((size <= 1).all() & (size > 0).all()) and size.unique().numel() == size.numel() and _counts(positions):
            return True
    return False


def _counts(node: fx.Node) -> bool:
    """Whether a node is positions: a range, or a running sum of a mask, moved and zeroed where the mask is."""
    for _ in range(_MOST_NODES):
        node = through(node, *_LAYOUT)
        if is_call(node, aten.arange, aten.cumsum):
            return True
        if not is_call(node, aten.add, aten.sub, aten.mul, aten.neg) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return False


def constant(
    node: fx.Node, sizes: Mapping[Any, int] | None = None, given: Mapping[fx.Node, Tensor] | None = None
) -> Tensor | None:
    """The value of a node that depends on no input, computed; None if it does, or writes anything.

    Args:
        sizes: numbers for symbolic sizes, on which the node may depend; a number that stands for another, wherever it occurs.
        given: values of inputs, on which it may depend; they may be written later.
    """
    given = given or {}
    order: dict[fx.Node, None] = {}
    front = [node]
    while front:
        current = front.pop()
        if current in order or current in given:
            continue
        order[current] = None
        if sizes and isinstance(value(current), torch.SymInt):
            continue
        if current.op != "call_function" or len(order) > _MOST_NODES or writes(current) or draws(current):
            return None
        front.extend(current.all_input_nodes)
    if any(written in order for n in order for user in n.users for written in writes(user)):
        return None
    if any(written in given and user < node for n in given for user in n.users for written in writes(user)):
        return None
    values: dict[fx.Node, Any] = dict(given)
    try:
        for current in sorted(order):
            if sizes and isinstance(value(current), torch.SymInt):
                values[current] = int(value(current).node.expr.subs(sizes))
                continue
            args, kwargs = fx.map_arg((current.args, current.kwargs), values.__getitem__)
            if sizes:
                args, kwargs = tree_map_only(
                    int, lambda n: n if isinstance(n, bool) else sizes.get(n, n), (args, kwargs)
                )
            kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
            assert callable(current.target)
            values[current] = current.target(*args, **kwargs)
    except Exception:  # an operator that cannot run here; the mask stays unknown
        return None
    found = values[node]
    return found if isinstance(found, Tensor) else None
