"""Keys before the rotary embedding, for storages that rotate them when they are read.

What the model's rotation reads of each position (cosines and sines) is kept once for all layers; the path from unrotated keys to
the cache is the model's own, whatever form of rotation that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import buffer
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New
from accelpass.passes.kv_cache.storage.key_path import Projected, projected, replays

Tables = tuple[tuple[str, int, str], ...]
"""Name, width and dtype of each tensor that the rotation reads of a position."""


def tables_of(keys: Projected) -> Tables:
    """What the rotation of these keys reads."""
    found = map(value, keys.tables)
    return tuple((f"rotation{i}", int(t.shape[3]), str(t.dtype).split(".")[1]) for i, t in enumerate(found))


def give_unrotated(program: Program, site: KVSite) -> Tables | str:
    """Hand a site's storage its keys before the rotation (``New.given["unrotated"]``, ``(batch, tokens, kv_heads, d)``), the
    tables' rows of its tokens, and the rotation (``New.functions["rotate"]``); or say why that cannot be done.
    """
    keys = projected(program, site.new[0])
    if isinstance(keys, str):
        return f"keys: {keys}"
    if not keys.tables:
        return "keys: they are not rotated by their position"
    made = value(site.new[0])
    why = replays(keys, made.shape[1], made.shape[3], site.capacity)
    if why is not None:
        return why
    tables = tables_of(keys)
    nodes = {"unrotated": keys.split} | {name: node for (name, *_), node in zip(tables, keys.tables, strict=True)}
    give(site.append, nodes, {"rotate": keys.function()}, {"unrotated": 1} | {name: 2 for name, *_ in tables})
    return tables


def table_states(tables: Tables | None, layout: Layout) -> list[StateSpec]:
    """Buffers for the tables of all positions."""
    return [buffer(name, (layout.capacity, width), getattr(torch, dtype)) for name, width, dtype in tables or ()]


def keep_tables(tables: Tables, held: Held, new: New) -> None:
    """Store the tables' rows of new tokens; the first layer does it for all."""
    if not new.leads:
        return
    at = new.count[0] + torch.arange(new.k.shape[2], device=new.count.device)
    for name, *_ in tables:
        rows = new.given[name].flatten(1, 2)
        held[name].index_copy_(1, at, rows.expand(held[name].shape[0], -1, -1).to(held[name].dtype))


def rotated(tables: Tables, held: Held, new: New, keys: Tensor, place: Tensor) -> Tensor:
    """Keys ``(batch, kv_heads, n, d)`` rotated as if they stood at ``place`` ``(batch, kv_heads, n)``."""
    read = []
    for name, *_ in tables:
        table = held[name].unsqueeze(1).expand(-1, place.shape[1], -1, -1)
        read.append(table.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, table.shape[-1])))
    return new.functions["rotate"](keys.transpose(1, 2), *read)
