"""A decoder with a key/value cache: the prompt's graph, the decoding step's, and the JSON that says how state goes between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.functional import Functional
from accelpass.ir.core.graph import aten, placeholders, value

if TYPE_CHECKING:
    from accelpass.backends.onnx.export import Graph
    from accelpass.caches.kv_cache import KVCache

FORMAT = 1


def started(made: Functional) -> Functional:
    """The prompt's graph starts from empty state by itself: it has no past of the sequence as inputs."""
    gm, graph = made.gm, made.gm.graph
    starts = {state.past: state for state in made.states if state.lifetime == "sequence"}
    for name, node in list(zip(made.inputs, placeholders(gm), strict=True)):
        if name not in starts:
            continue
        state, fake = starts[name], value(node)
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(first):
            fill = int(state.fill) if not fake.dtype.is_floating_point else state.fill
            filled = graph.call_function(aten.full.default, (list(fake.shape), fill), {"dtype": fake.dtype})
        filled.meta["val"] = fake
        node.replace_all_uses_with(filled)
        graph.erase_node(node)
    graph.lint()
    gm.recompile()
    inputs = {name: t for name, t in made.inputs.items() if name not in starts}
    return Functional(gm, inputs, made.outputs, made.states)


def manifest(graphs: Mapping[str, Graph], names: Mapping[str, str], data: str | None, cache: KVCache) -> dict[str, Any]:
    """What a program needs to know to run the files: names, shapes, types, and what the state starts with.

    Raises:
        ExportError: the two graphs keep different state, which is a fault of the passes.
    """
    prompt, decode = (graphs[names[kind]] for kind in ("prompt", "decode"))
    mine, its = ({s.name: _described(s.start, s.fill) for s in g.made.states} for g in (prompt, decode))
    if mine != its:
        odd = sorted(set(mine) ^ set(its)) or sorted(k for k in mine if mine[k] != its[k])
        raise ExportError(f"the prompt's graph and the decoding step's keep different state: {', '.join(odd[:3])}")
    return {
        "format": FORMAT,
        "files": dict(names),
        "data": data,
        "capacity": cache.capacity,
        "batch": cache.layers[0].batch_size,
        "inputs": {kind: _inputs(graphs[names[kind]]) for kind in names},
        "outputs": [name for name in prompt.made.outputs if not name.startswith("present.")],
        "state": [{"past": s.past, "present": s.present, **mine[s.name]} for s in prompt.made.states],
        "passes": [{"name": r.name, "sites": len(r.took)} for r in decode.records],
    }


def stateful(graph: Graph, file: str, data: str | None) -> dict[str, Any]:
    """The same of one graph without a cache, in which passes remember something."""
    states = graph.made.states
    return {
        "format": FORMAT,
        "files": {"model": file},
        "data": data,
        "inputs": {"model": _inputs(graph)},
        "outputs": [name for name in graph.made.outputs if not name.startswith("present.")],
        "state": [
            {"past": s.past, "present": s.present, **_described(s.start, s.fill), "lifetime": s.lifetime}
            for s in states
        ],
        "passes": [{"name": r.name, "sites": len(r.took)} for r in graph.records],
    }


def _inputs(graph: Graph) -> list[dict[str, Any]]:
    found = []
    for held in graph.model.graph.inputs:
        if not str(held.name).startswith("past."):
            shape = [d if isinstance(d, int) else str(d.value) for d in held.shape or ()]
            found.append({"name": held.name, "shape": shape, "dtype": str(held.dtype).lower()})
    return found


def _described(start: Tensor, fill: float) -> dict[str, Any]:
    dtype = str(start.dtype).removeprefix("torch.")
    number = int(fill) if not start.dtype.is_floating_point else fill
    assert bool((start == torch.tensor(number, dtype=start.dtype)).all())
    return {"shape": list(start.shape), "dtype": dtype, "fill": number}
