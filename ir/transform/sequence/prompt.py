"""A graph that reads a prompt: its attentions in order, and which inputs carry its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, Dim, axes
from accelpass.ir.analyses.axes.flow import output_nodes
from accelpass.ir.analyses.structure.linear import embeddings
from accelpass.ir.attention.recognition.detect import Attention, detect, near_misses
from accelpass.ir.attention.recognition.masks import is_causal_but_for_padding
from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.core.graph import (
    argument_name,
    aten,
    known,
    mutates,
    through,
    value,
    written_inputs,
)
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.sites import kv_sites

POSITIONS = ("position_ids", "cache_position", "positions", "position")
_BY_TOKEN = ("mask", "type")
"""Parts of the names of integer inputs that say something of each token, and are no positions."""
_LAYOUT = (aten.to, aten._to_copy, aten.view, aten.reshape, aten.unsqueeze, aten.expand, aten.clone, aten.contiguous)

HIDDEN = -1e4
"""A mask hides a key with at most this."""
_TRIED = 7


class NoPrompt(AccelpassError):
    """Says why tokens cannot be taken out of what a graph reads."""


@dataclass(frozen=True)
class TokenInput:
    """One input that depends on how many tokens there are.

    Attributes:
        node: the graph's input.
        role: ``rows`` (an entry for each token), ``positions`` or ``count`` (their number).
        dims: its dimensions of tokens.
    """

    node: fx.Node
    role: str
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Prompt:
    """What :func:`prompt` finds.

    Attributes:
        attentions: causal self-attentions over the prompt, in order.
        windows: of each, how many of the newest tokens it sees; 0 for all.
        batch, tokens: how many sequences and tokens; may be symbolic.
        inputs: those that depend on the tokens.
    """

    attentions: tuple[Attention, ...]
    windows: tuple[int, ...]
    batch: Any
    tokens: Any
    inputs: tuple[TokenInput, ...]

    @property
    def rows(self) -> TokenInput:
        """An input with an entry for each token."""
        return next(i for i in self.inputs if i.role == "rows")


def prompt(program: Program) -> Prompt:
    """The prompt that a graph reads into empty caches, or without any.

    Raises:
        NoPrompt: tokens cannot be taken out of it; says why.
    """
    attentions = _attentions(program)
    found: Axes = program.analysis(axes)
    q = attentions[0].q
    dims = found.of(q)
    token = dims[-2]
    if known(token.size == 1):
        raise NoPrompt("the graph reads one token alone")
    if not token.leaves or any(found.of(a.q)[-2].leaves != token.leaves for a in attentions):
        raise NoPrompt("the axis analysis cannot follow the tokens through all attentions")
    for node in output_nodes(program):
        if any(set(d.leaves) & set(token.leaves) for d in found.of(node)):
            raise NoPrompt(
                f"the graph returns {tuple(value(node).shape)}, a row for each token, also for those that would be dropped; "
                "logits_to_keep=1 (as generate passes it) returns the last alone, and accelpass.KVCache keeps keys and values inside"
            )
    by_node = {s.attention: s.window for s in kv_sites(program)}
    windows = tuple(a.spec.window or by_node.get(a.node, 0) for a in attentions)
    inputs = tuple(_inputs(program, found, token, value(q).shape[0]))
    return Prompt(attentions, windows, value(q).shape[0], token.size, inputs)


def _attentions(program: Program) -> tuple[Attention, ...]:
    sites = kv_sites(program)
    appended = {s.count for s in sites}
    other = [n for n in written_inputs(program.graph) if n not in appended]
    if other:
        raise NoPrompt(f"the graph writes to {other[0].name}, a cache of another kind; use accelpass.KVCache")
    every = [a for a in program.analysis(detect) if a.kind == "self" and a.node is not None]
    if sites:
        later = next((s for s in sites if not s.is_prompt), None)
        if later is not None:
            raise NoPrompt("the cache is not empty: later tokens are kept, all of them, behind the chosen ones")
        unread = next((s for s in sites if s.attention is None), None)
        if unread is not None:
            raise NoPrompt(f"{unread.path}: {unread.why}")
        nodes = {s.attention for s in sites}
        chosen = [a for a in every if a.node in nodes]
    else:
        chosen = [a for a in every if a.spec.bias in ("causal", "sliding_window") or a.spec.causal or _is_causal(a)]
    if not chosen:
        if every:
            raise NoPrompt(
                "no attention is known to be causal: where tokens see later ones, the last says nothing of what matters"
            )
        misses = program.analysis(near_misses)
        raise NoPrompt("no self-attention was recognised" + (f" ({misses[0].path}: {misses[0].why})" if misses else ""))
    for one in chosen:
        if one.spec.bias == "alibi":
            raise NoPrompt(f"{one.path}: its bias (ALiBi) is made from the positions of the whole text")
        if value(one.q).dim() != 4 or value(one.k).dim() != 4:
            raise NoPrompt(f"{one.path}: queries and keys are not (batch, heads, tokens, d)")
    return tuple(chosen)


def _is_causal(attention: Attention) -> bool:
    """Whether a mask is causal but for padding; or depends on nothing but a symbolic number of tokens, and is causal for one of them."""
    sizes = value(attention.q).shape[-2], value(attention.k).shape[-2]
    if is_causal_but_for_padding(attention.spec, attention.extras, *sizes):
        return True
    steps_ = [s for s in attention.spec.before if s.kind in MASKS]
    tokens = value(attention.q).shape[-2]
    if not steps_ or not isinstance(tokens, torch.SymInt):
        return False
    values: dict[fx.Node, Any] = {}
    order: dict[fx.Node, None] = {}
    front = list(attention.extras)
    while front:
        node = front.pop()
        if node in order:
            continue
        order[node] = None
        front += node.all_input_nodes
        if node.op == "placeholder" and isinstance(value(node), torch.SymInt) and known(value(node) == tokens):
            values[node] = _TRIED
        elif node.op != "call_function" or mutates(node):
            return False
    for node in sorted(order):
        if node not in values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    extras = [values[e] for e in attention.extras]
    device = value(attention.q).device
    scores = steps.apply(torch.zeros((1, 1, _TRIED, _TRIED), device=device), steps_, extras)
    wanted = torch.ones((_TRIED, _TRIED), dtype=torch.bool, device=device).tril()
    return bool(((scores > HIDDEN) == wanted).all())


def _inputs(program: Program, found: Axes, token: Dim, batch: Any) -> list[TokenInput]:
    looked_up = {through(e.indices, *_LAYOUT) for e in program.analysis(embeddings)}
    made, ambiguous = [], []
    for node in program.tensors.callers():
        given = value(node)
        if not node.users:
            continue
        if isinstance(given, torch.SymInt) and known(given == token.size):
            made.append(TokenInput(node, "count"))
        if not isinstance(given, Tensor):
            continue
        dims = tuple(i for i, d in enumerate(found.of(node)) if d.leaves == token.leaves)
        if not dims and any(set(d.leaves) & set(token.leaves) for d in found.of(node)):
            raise NoPrompt(f"the input {argument_name(node)} has its tokens merged with another dimension")
        if not dims:
            continue
        role = _role(node, looked_up)
        if role == "positions" and (given.dim() > 2 or dims != (given.dim() - 1,)):
            raise NoPrompt(f"the input {argument_name(node)} {tuple(given.shape)} holds positions of several axes")
        if role == "rows" and not known(batch == 1) and (0 in dims or not known(given.shape[0] == batch)):
            raise NoPrompt(f"the input {argument_name(node)} is shared by all sequences, which keep different tokens")
        if node in looked_up and role == "rows" and not any(part in argument_name(node) for part in _BY_TOKEN):
            ambiguous.append(argument_name(node))
        made.append(TokenInput(node, role, dims))
    if not any(i.role == "rows" for i in made):
        raise NoPrompt("no input has an entry for each token")
    if len(ambiguous) > 1:
        raise NoPrompt(f"of the inputs {' and '.join(ambiguous)} it cannot be told which are tokens and which positions; "
                       f"positions are known by one of the names {', '.join(POSITIONS)}")  # fmt: skip
    return made


def _role(node: fx.Node, looked_up: set[Any]) -> str:
    given, name = value(node), argument_name(node)
    if given.is_floating_point() or given.dtype == torch.bool:
        return "rows"
    if name in POSITIONS:
        return "positions"
    if node in looked_up or any(part in name for part in _BY_TOKEN):
        return "rows"
    raise NoPrompt(
        f"it cannot be told what the input {name} is; positions are known by one of the names {', '.join(POSITIONS)}"
    )


def positions_of(program: Program) -> list[fx.Node]:
    """The inputs in which a caller passes positions."""
    nodes = [n for n in program.tensors.callers() if n.users]
    return [n for n in nodes if isinstance(value(n), Tensor) and argument_name(n) in POSITIONS]
