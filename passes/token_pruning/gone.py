"""Caches of layers that tokens of a prompt have left for good: a row for each position, those of what has left neither written nor read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.core.program import Program
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Pass
from accelpass.passes.core.site_pass import claim
from accelpass.passes.token_pruning.memory import Memory
from accelpass.passes.token_pruning.rows_at_positions import RowsAtPositions

Behind = Mapping[int, Sequence[KVSite]]
"""Layers that read the same tokens, by a number above 0."""


def keep_what_is_left(program: Program, by: Pass, behind: Behind, rows: Mapping[int, fx.Node]) -> None:
    """Let the caches of a prompt be written where those tokens stand that layers read: ``rows`` by number, int64 ``(batch, kept)``; all
    tokens where there are none."""
    if not any(behind.values()):
        return
    first = kv_sites(program)[0]
    length, every = inserted(program, first.append, _all, first.new[0])
    (output,) = program.graph.find_nodes(op="output")
    memory = Memory(program, first)
    for number, sites in behind.items():
        memory.note(output, number, rows.get(number, every))
        _store(program, by, sites, {"rows": rows[number], "advance": length} if number in rows else {})


def read_what_is_left(program: Program, by: Pass, behind: Behind) -> None:
    """Let later tokens read, of the prompt, what is left in each layer, and all that came after it."""
    first = kv_sites(program)[0]
    start = first.append  # the layer counts its tokens there
    memory = Memory(program, first)
    (new,) = inserted(program, start, _positions, first.count, first.new[0])
    for number, sites in behind.items():
        have = memory.note(start, number, new)
        (keep,) = inserted(program, start, lambda have: [have[:, :-1].clone()], have)
        _store(program, by, sites, {"keep": keep})


def _store(program: Program, by: Pass, sites: Sequence[KVSite], named: dict[str, fx.Node]) -> None:
    for site in sites:
        claim(program, by.name, by.edits, [site.path])
        assert site.attention is not None
        set_spec(site.attention, spec_of(site.attention).edited(by=by.name, store=RowsAtPositions(False)))
        give(site.append, named, {})


def _all(k: Tensor) -> list[Tensor]:
    """How many tokens a prompt has, and their positions."""
    every = torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1).contiguous()
    return [torch.full((), k.shape[2], dtype=torch.int64, device=k.device), every]


def _positions(count: Tensor, k: Tensor) -> list[Tensor]:
    return [count[:, None] + torch.arange(k.shape[2], device=count.device)]
