"""A cache whose prompt was shortened: how many tokens were left out, and graphs of later calls that follow the short sequence.

Whoever calls the model goes on counting the tokens of the whole text (``generate`` passes positions and masks for all of
them). What was left out is state of the cache's first layer; graphs of later calls subtract it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.graph import aten, call, is_call, known, placeholders, through, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.sequence.prompt import positions_of
from accelpass.ir.transform.splice import splice, trace

DROPPED = StateSpec("tokens.dropped", (2,), torch.int64, "sequence", batched=True)
"""Of each sequence: tokens that were left out; those of them that are no padding, by which later positions move."""
_LAYOUT = (aten.to, aten._to_copy, aten.view, aten.reshape, aten.slice, aten.expand, aten.clone, aten.contiguous)


def seen_state(capacity: int) -> StateSpec:
    """Which rows of a cache hold tokens, and which padding."""
    return StateSpec("tokens.seen", (capacity,), torch.bool, "sequence", fill=1, batched=True)


def note(program: Program, chosen: fx.Node, seen: fx.Node, moved: fx.Node, visible: fx.Node) -> None:
    """Let a prompt's graph remember that it was shortened.

    Args:
        chosen: the rows that are left, ``(batch, kept)``; ``seen``, False where one of them is padding.
        moved: how many tokens that are no padding were left out, ``(batch,)``; visible: ``(batch, tokens)``.
    """
    sites = kv_sites(program)
    if not sites:
        return
    first, tensors = sites[0], program.tensors
    states = [tensors.state(first.count, spec) for spec in (DROPPED, seen_state(first.capacity))]

    def run(
        dropped: Tensor, valid: Tensor, chosen: Tensor, seen: Tensor, moved: Tensor, visible: Tensor
    ) -> list[Tensor]:
        dropped.select(1, 0).fill_(visible.shape[1] - chosen.shape[1])
        dropped.select(1, 1).copy_(moved)
        valid.fill_(True)
        valid.narrow(1, 0, seen.shape[1]).copy_(seen)
        return []

    operands = [*states, chosen, seen, moved, visible]
    (output,) = program.graph.find_nodes(op="output")
    splice(program, trace(program, run, operands), operands, output)


def follow(program: Program) -> list[str]:
    """Let a graph that reads a filled cache count as the cache does; returns what was done, for the report."""
    sites = [s for s in kv_sites(program) if not s.is_prompt]
    if not sites:
        return []
    first, graph, tensors = sites[0], program.graph, program.tensors
    dropped = tensors.state(first.count, DROPPED)
    seen = tensors.state(first.count, seen_state(first.capacity))
    positions, done = positions_of(program), []
    start = placeholders(program.gm)[-1].next
    with graph.inserting_before(start):
        for node in positions:
            users = list(node.users)
            of_each = value(node).dim() == 2 and known(value(node).shape[0] == value(first.count).shape[0])
            column = call(graph, start, aten.select.int, dropped, 1, int(of_each))
            less = call(graph, start, aten.unsqueeze.default, column, 1) if of_each else column
            if not of_each:  # one row of positions for all sequences, of which the same number of tokens were left out
                less = call(graph, start, aten.select.int, column, 0, 0)
            moved = call(graph, start, aten.sub.Tensor, node, less)
            for user in users:
                user.replace_input_with(node, moved)
            done.append("positions")
        # Layers raise their counters as they store; what follows needs the number of tokens before.
        before = call(graph, start, aten.clone.default, first.count)
    masks: dict[tuple[fx.Node, str, int], fx.Node] = {}
    for site in sites:
        done += _unmasked(program, site, (before, seen, dropped), masks)
    return sorted(set(done))


def _unmasked(
    program: Program, site: KVSite, states: tuple[fx.Node, ...], masks: dict[tuple[fx.Node, str, int], fx.Node]
) -> list[str]:
    """Where tokens were left out, the mask is that of the rows that there are, whatever the caller says of the text."""
    if site.attention is None:
        return []
    extras, done = list(site.attention.args[3]), []
    for step in spec_of(site.attention).before:
        at = step.extra
        if step.kind not in MASKS or at is None or not known(value(extras[at]).shape[-1] == site.capacity):
            continue
        key = (extras[at], step.kind, site.window)
        if key not in masks:
            run = _masking(step.kind, site.window, step.kind == "add" and not _is_mask(extras[at]))
            operands = [extras[at], *states]
            (masks[key],) = splice(program, trace(program, run, operands), operands, site.attention)
        extras[at] = masks[key]
        done.append("masks")
    site.attention.args = (*site.attention.args[:3], extras, *site.attention.args[4:])
    return done


def _masking(kind: str, window: int, hides: bool) -> Callable[..., list[Tensor]]:
    return lambda given, count, seen, dropped: [mask(given, count, seen, dropped, kind, window, hides)]


def _is_mask(extra: fx.Node) -> bool:
    """An additive mask that holds nothing else, such as a bias of distances."""
    source = through(extra, *_LAYOUT)
    return source.op == "placeholder" or is_call(source, aten.where, aten.masked_fill)


def mask(given: Tensor, count: Tensor, seen: Tensor, dropped: Tensor, kind: str, window: int, hides: bool) -> Tensor:
    """``given`` ``(..., tokens, capacity)``; for sequences whose prompt was shortened, the mask of what is stored.

    Args:
        count: tokens before the call, ``(batch,)``; ``seen``, ``dropped``: the states.
        kind: of the step that reads it: ``keep`` where True, ``fill`` where True, or ``add``.
        hides: ``given`` holds more than a mask; keys are hidden in it, and none shown.
    """
    slot = torch.arange(given.shape[-1], device=given.device)
    place = count[:, None] + torch.arange(given.shape[-2], device=given.device)
    allowed = (slot <= place[..., None]) & seen[:, None]
    if window:
        allowed = allowed & (slot > place[..., None] - window)
    allowed, short = allowed[:, None], (dropped[:, 0] > 0)[:, None, None, None]
    if kind == "add":
        low = torch.finfo(given.dtype).min
        own = torch.where(allowed, given if hides else 0.0, low).to(given.dtype)
        return torch.where(short, own, given)
    own = allowed if kind == "keep" else allowed.logical_not()
    return (short & own) | (short.logical_not() & given)  # ONNX Runtime has no choice between truth values
