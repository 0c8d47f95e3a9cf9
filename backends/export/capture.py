"""From a model and example arguments to a canonical program, by torch.export, with names for what goes in and comes out."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from accelpass.backends.export.errors import ExportError
from accelpass.ir import attention
from accelpass.ir.core.capture import from_export
from accelpass.ir.core.graph import ARGUMENT, placeholders, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.torch_private import keystr, tree_flatten_with_path, tree_leaves, tree_map

Wishes = dict[int, tuple[str, Any]]
"""Of one input: its dynamic dimensions, each with the name it has in the file and what torch.export is told."""


@dataclass
class Captured:
    """A program, and what its flat inputs and outputs are called in the file.

    Attributes:
        inputs: the caller's tensors by name, in the order of the graph's placeholders; cache counters come after them.
        counters: the placeholders that count the tokens of cache layers, layer by layer.
        wishes: dynamic dimensions that the caller asked for, by input name.
        note: what could not be done, for the report.
        exported: what the program was made from.
        sources: inputs that are not the caller's, by name; see :class:`accelpass.backends.export.stepped.Source`.
    """

    program: Program
    inputs: dict[str, Tensor]
    outputs: list[str]
    counters: list[fx.Node]
    wishes: dict[str, Wishes]
    note: str = ""
    counts: list[Tensor] = field(default_factory=list)
    exported: torch.export.ExportedProgram | None = None
    sources: dict[str, Any] = field(default_factory=dict)

    def anew(self) -> Captured:
        """The program as it was captured; to be taken before this one's names are changed."""
        assert self.exported is not None
        return _named(self.exported, self.inputs, self.outputs, self.wishes, self.counts)

    def placeholder(self, name: str) -> fx.Node:
        """The placeholder of one of :attr:`inputs`."""
        return placeholders(self.program.gm)[list(self.inputs).index(name)]


def bound(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the model's forward by name.

    Raises:
        ExportError: they do not fit its signature.
    """
    try:
        found = inspect.signature(model.forward).bind(*args, **dict(kwargs or {}))
    except TypeError as cause:
        raise ExportError(f"args and kwargs do not fit {type(model).__name__}.forward: {cause}") from None
    given: dict[str, Any] = {}
    for name, value in found.arguments.items():
        kind = found.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise ExportError(
                f"{type(model).__name__}.forward takes *{name}, whose tensors have no names; wrap the model"
            )
        else:
            given[name] = value
    return given


def captured(
    model: torch.nn.Module, given: Mapping[str, Any], dynamic_shapes: Any, cache: Any = None, fresh: bool = True
) -> Captured:
    """Trace ``model(**given)``.

    Args:
        dynamic_shapes: as torch.export takes it, by argument name or in their order; names of dimensions may be strings.
        cache: an ``accelpass.KVCache`` among the arguments; ``fresh``: traced as an empty one.

    Raises:
        ExportError: the model cannot be traced for these arguments; says what torch.export found.
    """
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode; type: model.eval()")
    tensors = {
        name: v for name, v in given.items() if v is not cache and any(isinstance(t, Tensor) for t in tree_leaves(v))
    }
    fixed = {name: v for name, v in given.items() if name not in tensors}
    place = next((name for name, v in fixed.items() if cache is not None and v is cache), None)
    if cache is not None and place is None:
        raise ExportError("a KVCache is an argument of its own: past_key_values=cache")
    counts = [torch.zeros_like(layer.count) for layer in cache.layers] if cache is not None else []
    wishes, shapes = _wishes(tensors, list(given), dynamic_shapes)
    outputs: list[str] = []

    def forward(inputs: dict[str, Any], counts: list[Tensor]) -> list[Tensor]:
        extra = {place: cache.counted(counts, fresh)} if place is not None else {}
        made = type(twin).forward(twin, **{**inputs, **fixed, **extra})
        outputs[:], leaves = _named_outputs(made)
        return leaves

    # Copies: of one tensor given twice the trace would read the first alone, and of a weight given as an input the weight.
    tensors = {
        name: tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, v) for name, v in tensors.items()
    }
    twin = copy.copy(model)  # its modules and parameters are the model's own
    if "forward" in model.__dict__:
        raise ExportError(
            f"the forward of this {type(model).__name__} was replaced; give the model as its class defines it"
        )
    twin.forward = forward
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                twin, (tensors, counts), dynamic_shapes=(shapes, [None] * len(counts)), strict=False
            )
    except Exception as cause:  # torch.export raises some twenty types; each is about the model and these arguments
        raise ExportError(_untraced(model, cause, wishes)) from cause
    names = _leaf_names(tensors)
    outputs = [f"output.{name}" if name in names else name for name in outputs]  # a file has no two values of one name
    found = _named(exported, names, outputs, wishes, counts)
    program = found.program
    written = written_inputs(program.graph).difference(found.counters)
    if written:
        worst = sorted(program.tensors.path(n) or n.name for n in written)[0]
        raise ExportError(
            f"the model writes to {worst}, which a file cannot; call it in eval mode, and for a key/value cache give "
            "past_key_values=accelpass.KVCache(model, capacity=...)"
        )
    return found


def _named(
    exported: torch.export.ExportedProgram,
    names: dict[str, Tensor],
    outputs: list[str],
    wishes: dict[str, Wishes],
    counts: list[Tensor],
) -> Captured:
    program, note = _with_attention(exported)
    nodes = placeholders(program.gm)
    for name, node in zip(names, nodes, strict=False):
        node.meta[ARGUMENT] = name
    return Captured(program, dict(names), list(outputs), nodes[len(names) :], wishes, note, counts, exported)


def _with_attention(exported: torch.export.ExportedProgram) -> tuple[Program, str]:
    """The program with its attentions as semantic nodes, as the backend of torch.compile has it."""
    program = from_export(exported)
    try:
        with torch.no_grad():
            attention.insert(program)
    except Exception as cause:  # an unforeseen spelling of attention must not stop the export
        return from_export(exported), f"attention stays as the model wrote it: {type(cause).__name__}: {cause}"
    return program, ""


def _wishes(tensors: Mapping[str, Any], order: Sequence[str], asked: Any) -> tuple[dict[str, Wishes], dict[str, Any]]:
    """What the caller wants dynamic, by leaf name, and the same as torch.export takes it."""
    if asked is None:
        asked = {}
    if isinstance(asked, list | tuple):
        asked = dict(zip(order, asked, strict=False))
    for name in asked:
        if name not in tensors and asked[name] is not None:
            near = difflib.get_close_matches(str(name), list(tensors), 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ExportError(f"dynamic_shapes names {name!r}{hint}; tensors are given for: {', '.join(tensors)}")
    wishes: dict[str, Wishes] = {}

    def leaf(name: str, tensor: Any, spec: Any) -> Any:
        if not isinstance(tensor, Tensor) or spec is None:
            return None
        pairs = spec.items() if isinstance(spec, dict) else enumerate(spec)
        made = {}
        for dim, wish in pairs:
            if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
                raise ExportError(f"dynamic_shapes: {name} has {tensor.dim()} dimensions, none is numbered {dim!r}")
            hint = _hint(wish)
            if hint is not None:
                dim %= tensor.dim()
                made[dim] = hint
                label = wish if isinstance(wish, str) else getattr(wish, "__name__", "") or f"{name}_{dim}"
                wishes.setdefault(name, {})[dim] = (label, hint)
        return made or None

    def tree(name: str, value: Any, spec: Any) -> Any:
        if isinstance(value, Tensor) or spec is None:
            return leaf(name, value, spec) if isinstance(value, Tensor) else tree_map(lambda _: None, value)
        if isinstance(value, dict):
            return {k: tree(f"{name}.{k}", v, spec.get(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(tree(f"{name}.{i}", v, s) for i, (v, s) in enumerate(zip(value, spec, strict=True)))
        raise ExportError(
            f"dynamic_shapes for {name}, a {type(value).__name__}, is not supported; give its tensors apart"
        )

    return wishes, {name: tree(name, value, asked.get(name)) for name, value in tensors.items()}


def _hint(wish: Any) -> Any:
    """What torch.export is told of one dimension; None for a fixed one."""
    if wish is None or wish is Dim.STATIC or isinstance(wish, int):
        return None
    if isinstance(wish, str) or wish is Dim.DYNAMIC:
        return Dim.DYNAMIC
    if hasattr(wish, "__name__") and hasattr(wish, "min"):  # a Dim of the caller's
        largest = None if wish.max >= 2**31 else wish.max
        return Dim.DYNAMIC(min=max(2, wish.min), max=largest) if wish.min > 0 or largest else Dim.DYNAMIC
    return wish


def tensors_by_name(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a call's arguments, as the file's inputs are called."""
    return _leaf_names({name: v for name, v in given.items() if any(isinstance(t, Tensor) for t in tree_leaves(v))})


def _leaf_names(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    flat, _ = tree_flatten_with_path(dict(tensors))
    for path, leaf in flat:
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"{_dotted(path)} is {leaf!r} among tensors; give numbers and None as arguments of their own"
            )
    return {_dotted(path): leaf for path, leaf in flat}


def _named_outputs(made: Any) -> tuple[list[str], list[Tensor]]:
    # Outputs of transformers and diffusers are dictionaries of classes of their own, which not every tree knows.
    flat, _ = tree_flatten_with_path(dict(made.items()) if isinstance(made, dict) else made)
    found = [(_dotted(path) or "output", leaf) for path, leaf in flat if isinstance(leaf, Tensor)]
    if not found:
        raise ExportError("the model returns no tensor")
    names = [f"output.{name}" if name.isdigit() else name for name, _ in found]
    return names, [leaf for _, leaf in found]


def _dotted(path: Any) -> str:
    """``['past'][0].keys`` as ``past.0.keys``."""
    text: str = keystr(path)
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", "")):
        text = text.replace(old, new)
    return text.strip(".")


def _untraced(model: torch.nn.Module, cause: Exception, wishes: Mapping[str, Wishes]) -> str:
    first = " ".join(str(cause).split())[:400]
    dims = ", ".join(f"{name}[{dim}]" for name, of in wishes.items() for dim in of)
    if "ConstraintViolation" in type(cause).__name__ or "Constraints violated" in first or "specialized" in first:
        return (
            f"the model fixes a dimension that dynamic_shapes asks to be dynamic ({dims}): {first} Leave that dimension out of "
            "dynamic_shapes, or give example inputs in which it is 2 or more."
        )
    return f"torch.export cannot trace {type(model).__name__}: {type(cause).__name__}: {first}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
