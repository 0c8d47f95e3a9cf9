"""From a functional graph to an ONNX model: torch's exporter, the optimiser, and the proof that no weight grew."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnxscript.optimizer
import torch

from accelpass.backends.export.capture import Wishes
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.functional import Functional, refuse_fixed
from accelpass.backends.onnx.translation.packed_weights import OPSET, Expansion
from accelpass.backends.onnx.translation.translations import DOMAIN, own_operators, table

OLDEST, NEWEST = 18, 23
"""Opsets that torch's exporter has translations for."""
_FOLDED = 1024
"""Elements up to which the optimiser may compute constants: shapes and scalars, no weight."""
_SLACK = 64 * 1024
"""Bytes of constants that a file may have besides the model's own."""


@dataclass(frozen=True)
class Form:
    """How a file is written: the opset, whether with ONNX Runtime's own operators, and whether products of packed weights may
    round activations to int8 in ONNX Runtime."""

    opset: int
    contrib: bool = False
    rounded: bool = False


def check_opset(opset: int) -> None:
    """Raise :class:`ExportError` for an opset that cannot be written."""
    if not isinstance(opset, int) or not OLDEST <= opset <= NEWEST:
        raise ExportError(
            f"opset={opset!r} is not supported; use {OLDEST} to {NEWEST} (packed weights need {OPSET} or more)"
        )


def translated(
    made: Functional, wishes: Mapping[str, Wishes], form: Form, weight_bytes: int, who: str, theirs: Collection[str]
) -> tuple[ir.Model, list[str]]:
    """The ONNX model of a graph, and notes for the report.

    Args:
        weight_bytes: of the tensors that the graph reads; the file may not hold more.
        who: the passes that rewrote the graph, for messages.
        theirs: custom operators that the model had before the passes.

    Raises:
        ExportError: an operator has no translation, the opset lacks something, or a weight would grow.
    """
    refuse_unknown(made.gm.graph, theirs, who)
    try:
        with _silent():
            exported = made.exported()
    except Exception as cause:  # torch.export raises some twenty types
        raise ExportError(
            f"the graph that {who} made cannot be exported: {type(cause).__name__}: {_one_line(cause)}"
        ) from cause
    refuse_fixed(exported, list(made.inputs), wishes, who)
    try:
        with _silent():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=form.opset,
                input_names=list(made.inputs),
                output_names=made.outputs,
                custom_translation_table=dict(table()),
                optimize=False,
                verbose=False,
            )
    except Exception as cause:  # the exporter wraps what went wrong in classes of its own
        raise ExportError(f"torch.onnx cannot write the graph that {who} made: {_root(cause)}") from cause
    assert program is not None
    model: ir.Model = program.model
    with _silent():
        onnxscript.optimizer.optimize(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    packed = [n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN]
    if packed and not form.contrib and form.opset < OPSET:
        raise ExportError(
            f"packed weights need opset {OPSET} or more (DequantizeLinear with blocks), and opset={form.opset} was asked for; type "
            f"opset={OPSET}, or contrib=True for ONNX Runtime's own operators"
        )
    if any(kind.endswith("Matrix") for kind in packed) and form.opset < OPSET:
        raise ExportError(f"packed experts need opset {OPSET} or more; type opset={OPSET}")
    # Here, as the optimiser is through: what packed weights become below is made from the pass's integers.
    _refuse_growth(model, weight_bytes, who)
    expansion = Expansion(model, form.contrib, form.rounded)
    expansion.run()
    notes = list(expansion.notes)
    _name_outputs(model, made.outputs)
    _name_dimensions(model, wishes)
    model.producer_name, model.producer_version = "accelpass", _version()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    return model, notes


def refuse_unknown(graph: torch.fx.Graph, theirs: Collection[str], who: str) -> None:
    """Raise :class:`ExportError` for custom operators that have no translation; ``theirs`` are the model's own."""
    unknown = own_operators(graph)
    if not unknown:
        return
    of_model = [name for name in unknown if name in theirs]
    if any("grouped_mm" in name for name in of_model):
        raise ExportError(
            f"{', '.join(of_model)}, by which the model computes its experts, has no translation to ONNX; type: "
            "model.set_experts_implementation('batched_mm')"
        )
    source, remedy = (who, "Leave the pass out, or say") if not of_model else ("the model itself", "Say")
    raise ExportError(
        f"{', '.join(of_model or unknown)} (from {source}) has no translation to ONNX. {remedy} how the operator is "
        "written: accelpass.backends.onnx.register_translation(op, onnxscript_function)"
    )


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and constants."""
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            stored += node.attributes["value"].as_tensor().nbytes
    return stored


def _refuse_growth(model: ir.Model, weight_bytes: int, who: str) -> None:
    found, allowed = constant_bytes(model), weight_bytes + weight_bytes // 20 + _SLACK
    if found <= allowed:
        return
    largest = sorted(model.graph.initializers.values(), key=lambda v: -(v.const_value.nbytes if v.const_value else 0))[
        :3
    ]
    shown = ", ".join(f"{v.name} ({v.dtype}, {v.const_value.nbytes / 1e6:.1f} MB)" for v in largest if v.const_value)
    raise ExportError(
        f"the file would hold {found / 1e6:.1f} MB of weights, and {who} left {weight_bytes / 1e6:.1f} MB: packed weights were "
        f"turned back into floats. The largest: {shown}. Leave the pass out, or let its operator keep the activation inside "
        "and register a translation (accelpass.backends.onnx.register_translation)."
    )


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give each output its name and a value of its own, where the optimiser took two for one or an input for an output."""
    graph = model.graph
    assert len(graph.outputs) == len(names)
    taken: set[int] = set()
    for position, (held, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if held.producer() is None or id(held) in taken:
            same = ir.node("Identity", [held])
            same.outputs[0].type, same.outputs[0].shape = held.type, held.shape
            graph.append(same)
            if held.name == name:  # a constant that took the output's name
                held.name = f"{name}.constant"
            graph.outputs[position] = held = same.outputs[0]
        held.name = name
        taken.add(id(held))


def _name_dimensions(model: ir.Model, wishes: Mapping[str, Wishes]) -> None:
    """Give symbolic dimensions the caller's names, wherever they occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, (label, _) in wishes.get(value.name or "", {}).items():
            assert value.shape is not None
            size = value.shape[dim]
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(str(size.value), label)
    values = {id(v): v for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        values |= {id(v): v for v in node.outputs}
    for value in values.values():
        if value.shape is not None:
            sizes = [names.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(sizes)


def summary(model: ir.Model) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in model.graph.all_nodes())


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch's exporter prints its progress and warns of packages that it could use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _version() -> str:
    import accelpass

    return str(accelpass.__version__)
