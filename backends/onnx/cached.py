"""A decoder with a key/value cache: the prompt's graph, the decoding step's, and the JSON that says how state goes between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelpass.backends.onnx.errors import ExportError
from accelpass.backends.onnx.functional import Functional
from accelpass.ir.core.graph import aten, placeholders, value

if TYPE_CHECKING:
    from accelpass.backends.onnx.export import Graph
    from accelpass.caches.kv_cache import KVCache

FORMAT = 1
_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
"""Arguments whose second dimension are the tokens of a call."""


def _is_cache(held: Any) -> bool:
    return type(held).__module__ == "accelpass.caches.kv_cache" and type(held).__name__ == "KVCache"


def refuse_kept(model: torch.nn.Module) -> None:
    """Raise :class:`ExportError` for a KVCache that a module keeps as an attribute: a file's state goes in and comes out."""
    for path, module in model.named_modules():
        for name, held in vars(module).items():
            if _is_cache(held):
                raise ExportError(
                    f"the model keeps a KVCache as its attribute {f'{path}.{name}'.strip('.')}, and a file's state has to go in and "
                    "come out: let forward take it as an argument (past_key_values=cache), and give an empty one"
                )


def cache_of(given: Mapping[str, Any]) -> tuple[str, KVCache] | None:
    """The KVCache among the arguments and its name.

    Raises:
        ExportError: it holds tokens already.
    """
    for name, held in given.items():
        if _is_cache(held):
            if held.seen:
                raise ExportError(f"the KVCache holds {held.seen} tokens; give an empty one: {name}.reset()")
            return name, held
    return None


def decoding(given: Mapping[str, Any], place: str, decode: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call for one more token, made from a prompt's or given as ``decode``.

    Raises:
        ExportError: what a tensor is for such a call is not known.
    """
    if decode is not None:
        return {**decode, place: given[place]}
    made = dict(given)
    for name, held in given.items():
        if isinstance(held, Tensor):
            if name not in _OF_TOKENS:
                raise ExportError(
                    f"what {name} is in a call for one token is not known; give that call's arguments: "
                    "decode={'input_ids': ..., " + repr(name) + ": ...}"
                )
            made[name] = held[:, :1].contiguous()
    return made


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
