"""Caches of layers that tokens of a prompt have left for good: a row for each position, those of what has left neither written nor read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.core.graph import written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Storage
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Pass
from accelpass.passes.core.site_pass import claim
from accelpass.passes.kv_cache.base import NO_CACHE, cannot_store
from accelpass.passes.token_pruning.memory import Memory
from accelpass.passes.token_pruning.rows_at_positions import RowsAtPositions

_AT_POSITIONS = RowsAtPositions(False)
Behind = Mapping[int, Sequence[KVSite]]
"""Layers that read the same tokens, by a number above 0."""


def why_none_may_leave(program: Program, sites: Sequence[KVSite], behind: Sequence[fx.Node]) -> str | None:
    """Why tokens of a prompt may not leave in front of the attentions ``behind``, or None; the same in all graphs of a model."""
    if not sites and written_inputs(program.graph):
        return f"it writes to a cache of another kind: {NO_CACHE}"
    for site in sites:
        if (why := cannot_store(site)) is not None:
            return f"{site.path}: {why}"
    windows = {site.attention: site.window for site in sites}
    for node in behind:
        spec = spec_of(node)
        if spec.bias == "sliding_window" or spec.window or windows.get(node):
            return f"{spec.site}: it sees a window of positions, which tokens that are taken out leave holes in"
    return None


def keep_what_is_left(program: Program, by: Pass, behind: Behind, rows: Mapping[int, fx.Node]) -> None:
    """Let the caches of a prompt be written where those tokens stand that layers read: ``rows`` by number, int64 ``(batch, kept)``; all
    tokens where there are none."""
    for number, sites in behind.items():
        if not sites:
            continue
        length = noted(program, number, rows.get(number))
        for site in sites:
            store(program, by, site, {"rows": rows[number], "advance": length} if number in rows else {})


def read_what_is_left(program: Program, by: Pass, behind: Behind) -> None:
    """Let later tokens read, of the prompt, what is left in each layer, and all that came after it."""
    for number, sites in behind.items():
        if not sites:
            continue
        keep = recalled(program, number)
        for site in sites:
            store(program, by, site, {"keep": keep})


def noted(program: Program, number: int, rows: fx.Node | None) -> fx.Node:
    """Let a cache remember, under a number, these tokens of a prompt, or all; returns how many tokens the prompt has."""
    first = kv_sites(program)[0]
    length, every = inserted(program, first.append, _all, first.new[0])
    (output,) = program.graph.find_nodes(op="output")
    Memory(program, first).note(output, number, rows or every)
    return length


def recalled(program: Program, number: int) -> fx.Node:
    """Which tokens were noted under a number, those of this call among them: bool ``(batch, capacity)``."""
    first = kv_sites(program)[0]
    start = first.append  # the layer counts its tokens there
    (new,) = inserted(program, start, _positions, first.count, first.new[0])
    have = Memory(program, first).note(start, number, new)
    return inserted(program, start, lambda have: [have[:, :-1].clone()], have)[0]


def store(program: Program, by: Pass, site: KVSite, given: dict[str, fx.Node], how: Storage = _AT_POSITIONS) -> None:
    """Let a layer keep its tokens so, with what a storage is ``given`` in this graph."""
    claim(program, by.name, by.edits, [site.path])
    assert site.attention is not None
    set_spec(site.attention, spec_of(site.attention).edited(by=by.name, store=how))
    give(site.append, given, {})


def _all(k: Tensor) -> list[Tensor]:
    """How many tokens a prompt has, and their positions."""
    every = torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1).contiguous()
    return [torch.full((), k.shape[2], dtype=torch.int64, device=k.device), every]


def _positions(count: Tensor, k: Tensor) -> list[Tensor]:
    return [count[:, None] + torch.arange(k.shape[2], device=count.device)]
