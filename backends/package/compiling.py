"""One graph on its way into a package: rewritten, lowered for the CPU, traced anew, compiled ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from accelpass.backends.compile.inductor import fused_multiply_add
from accelpass.backends.compile.lowering import lower
from accelpass.backends.export.capture import Captured
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.functional import Functional, in_place
from accelpass.backends.export.passes import applied, computed_in_full, refuse_guarded
from accelpass.backends.package.file.manifest import Graph, Size, Value
from accelpass.backends.package.library import constant_names
from accelpass.ir import attention
from accelpass.ir.analyses.structure.cost import weight_bytes
from accelpass.ir.attention.lowering.lower import without_python
from accelpass.ir.errors import CompilerMissingError
from accelpass.ir.inductor_private import NoCompiler, compile_ahead
from accelpass.ir.kv import lower as kv
from accelpass.ir.torch_private import OpOverload
from accelpass.passes.core.base import Record
from accelpass.passes.core.options import Options

_TORCH = frozenset({"aten", "prims", "prim", "quantized", "mkldnn", "onednn"})
"""Namespaces of operators that a library finds in torch itself."""


@dataclass
class Rewritten:
    """A graph after its passes: a module of its own that writes its state in place.

    Attributes:
        exact: results must equal the model's up to the order of float additions.
        weights_before: bytes of the constants that the model reads.
    """

    made: Functional
    records: list[Record]
    exact: bool
    notes: list[str]
    labels: Mapping[str, Mapping[int, str]]
    weights_before: int


@dataclass
class Compiled:
    """A graph's library, and what the manifest says of it."""

    rewritten: Rewritten
    graph: Graph
    files: dict[str, bytes]
    constants: dict[str, Tensor]
    seconds: float


@torch.no_grad()
def rewritten(found: Captured, chosen: Options, who: str, edit: Callable[[], None] = lambda: None) -> Rewritten:
    """Apply the passes, those that torch.compile has by default among them, and lower what they made.

    Args:
        edit: changes the graph after that.

    Raises:
        ExportError: what they made needs Python while it runs, or fixes a dimension.
    """
    program, before = found.program, weight_bytes(found.program)
    records, debugging = applied(found, chosen.passes, chosen, who, chosen.asked)
    kv.lower(program)
    masked = computed_in_full(program, "the kernel that leaves blocks of keys out runs in Python")
    attention.lower(program, without_python())
    lower(program)
    program.graph.eliminate_dead_code()
    program.changed()
    refuse_guarded(found, who)
    notes = [*masked, *([found.note] if found.note else [])]
    if debugging is not None:
        debugging.lowered(program)
        notes.append(debugging.note)
    _refuse_python(program.graph, who)
    labels = {name: {dim: label for dim, (label, _) in wishes.items()} for name, wishes in found.wishes.items()}
    edit()
    made = in_place(found)
    _contiguous(made.gm)
    took = {record.name for record in records if record.took}
    exact = all(p.exact for p in chosen.passes if p.name in took)
    return Rewritten(made, records, exact, notes, labels, before)


def compiled(rewritten: Rewritten, folder: Path, settings: Mapping[str, Any]) -> Compiled:
    """Compile a graph ahead of time.

    Args:
        folder: where its files may lie until they are read.
        settings: of Inductor.

    Raises:
        CompilerMissingError: there is no C++ compiler that works.
        ExportError: torch cannot trace or compile what the passes made.
    """
    began, made = time.perf_counter(), rewritten.made
    patches = {**({} if rewritten.exact else fused_multiply_add()), **settings}
    try:
        exported = made.exported()
        files = compile_ahead(exported, {**patches, "aot_inductor.output_path": str(folder)})
    except NoCompiler as failure:
        raise CompilerMissingError(
            f"packaging needs a C++ compiler: {failure} Install one (apt install g++) or name yours in the environment variable "
            "CXX. The machine that opens the package needs none."
        ) from failure
    except Exception as cause:  # torch.export and Inductor raise dozens of types, each of them about this graph
        told = " ".join(str(cause).split())[:400]
        raise ExportError(
            f"torch {torch.__version__} cannot compile this graph ahead of time: {type(cause).__name__}: {told}"
        ) from cause
    kept = {Path(f).name: Path(f).read_bytes() for f in files if f.endswith((".so", ".json"))}
    held: dict[str, Any] = {**exported.state_dict, **exported.constants}
    names = constant_names(kept)
    constants = {name: held[original].detach() for name, original in names.items()}
    inputs = _values(rewritten, exported)
    graph = Graph(inputs, list(made.outputs), dict.fromkeys(constants, ""))
    return Compiled(rewritten, graph, kept, constants, time.perf_counter() - began)


def _values(rewritten: Rewritten, exported: torch.export.ExportedProgram) -> list[Value]:
    """The callers' inputs, as the compiled graph takes them."""
    made, states = rewritten.made, {s.past for s in rewritten.made.states}
    nodes = [n for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    names: dict[str, str] = {}
    values = []
    for name, node in zip(made.inputs, nodes, strict=True):
        if name in states:
            continue
        shape: list[int | Size] = []
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) or not free_symbols(size):
                shape.append(int(size))
                continue
            text = str(size.node.expr)
            label = names.setdefault(text, rewritten.labels.get(name, {}).get(dim, text))
            bounds = exported.range_constraints.get(size.node.expr)
            most = None if bounds is None or not bounds.upper.is_Integer else int(bounds.upper)
            shape.append(Size(label, 2, None if most is not None and most >= 2**31 else most))
        values.append(Value(name, str(node.meta["val"].dtype).removeprefix("torch."), shape))
    return values


def _refuse_python(graph: fx.Graph, who: str) -> None:
    """Raise :class:`ExportError` for an operator that a library would not find in torch."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.target.namespace not in _TORCH:
            raise ExportError(
                f"{who} leaves the operator {node.target} in the graph, which runs in Python, and a package runs without it. "
                "Leave the pass out, or use torch.compile(model, backend='accelpass')"
            )


def _contiguous(gm: fx.GraphModule) -> None:
    """Constants as they will lie in the file."""
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        if not tensor.is_contiguous():
            owner, _, last = name.rpartition(".")
            module = gm.get_submodule(owner)
            made: Any = tensor.detach().contiguous()
            setattr(module, last, torch.nn.Parameter(made, False) if isinstance(tensor, torch.nn.Parameter) else made)


def inputs_at(graph: Graph, example: Mapping[str, Tensor], size: str, length: int) -> list[Tensor]:
    """The example's inputs with the dimensions called ``size`` of another length: cut, or repeated from the front."""
    made = []
    for wanted in graph.inputs:
        tensor = example[wanted.name]
        for dim, known in enumerate(wanted.shape):
            if isinstance(known, Size) and known.name == size:
                tensor = tensor.index_select(dim, torch.arange(length) % tensor.shape[dim])
        made.append(tensor.contiguous())
    return made


def dynamic_sizes(graph: Graph) -> list[Size]:
    """Each once."""
    found = {size.name: size for value_ in graph.inputs for size in value_.shape if isinstance(size, Size)}
    return list(found.values())


def state_of(rewritten: Rewritten) -> list[Tensor]:
    """State as it begins, anew."""
    return [s.start.clone() for s in rewritten.made.states]
