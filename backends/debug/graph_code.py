"""A program's graph as code that a person can read: short names, shapes, module paths, and specs in words."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.attention.spec.spec import All as Everything
from accelpass.ir.attention.spec.spec import AttentionSpec, Dense, Native, Part
from accelpass.ir.core.graph import argument_name, module_path, placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.linear.op import is_packed, linear_spec
from accelpass.ir.torch_private import OpOverload, tree_leaves

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_COLUMN = 60
"""Where the comment with a result's shape begins, if the call is no longer."""


def listing(program: Program) -> str:
    """The graph as a Python function whose body has one line for each call.

    Inputs are named for the parameter or the argument that they are. Calls stand under the path of the module that made
    them. A line says the dtype and shape of its result: ``f32[1, 4, 64]``. Attentions have their spec in words above,
    which ``spec=...`` stands for.
    """
    return _Writer(program).function()


def inputs_said(program: Program) -> str:
    """The caller's own inputs, which tell one graph of a model from another: ``ids i64[1, 4]``."""
    own = (f"{argument_name(n)} {said(value(n))}" for n in program.tensors.callers())
    return ", ".join(own) or "no inputs of the caller"


def said(held: Any) -> str:
    """Dtype and shape of a value, ``f32[2, 64]``; of several, each; of a number, its type or expression."""
    if isinstance(held, Tensor):
        device = "" if held.device.type == "cpu" else f" {held.device}"
        sizes = ", ".join(str(n) for n in held.shape)
        return f"{_SHORT.get(held.dtype, str(held.dtype).removeprefix('torch.'))}[{sizes}]{device}"
    if isinstance(held, tuple | list):
        return f"({', '.join(said(h) for h in held)})"
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(held)
    return type(held).__name__


def spec_in_words(spec: AttentionSpec) -> list[str]:
    """What an attention computes, a line for each part that is not what every attention has."""
    heads = f"{spec.groups} query heads share a key/value head" if spec.groups > 1 else "each head has its own keys"
    causal = ", causal" if spec.causal else ""
    lines = [f"{spec.kind} attention{f' of {spec.site}' if spec.site else ''}: {heads}"]
    lines.append(f"  scores = q @ k^T * {spec.scale:g}{causal}; then {', '.join(s.shown() for s in spec.steps)}")
    if spec.bias != "none" or spec.window is not None:
        window = f" of {spec.window} tokens" if spec.window is not None else ""
        lines.append(f"  its mask is {spec.bias.replace('_', ' ')}{window}")
    edited: dict[str, list[str]] = {}
    for by, name in spec.edits:
        edited.setdefault(name, []).append(by)
    what: tuple[tuple[str, str, Part, Part], ...] = (
        ("store", "keeps", spec.store, Dense()),
        ("format", "written as", spec.format, Native()),
        ("select", "reads", spec.select, Everything()),
    )
    for name, verb, part, plain in what:
        if part != plain:
            editors = f"  [{', '.join(edited[name])}]" if name in edited else ""
            lines.append(f"  {verb} {_part(part)}{editors}")
    if spec.statistics:
        lines.append(f"  also returns {', '.join(sorted(spec.statistics))}")
    return lines


def _part(part: Part) -> str:
    given = ", ".join(f"{f.name}={_cut(getattr(part, f.name))}" for f in fields(part))
    return f"{part.part.replace('_', ' ')}({given})"


def _cut(what: Any) -> str:
    text = str(what)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Writer:
    """Writes one graph, whose inputs have the names of what they are."""

    def __init__(self, program: Program):
        self.program, self.tensors = program, program.tensors
        taken = {n.name for n in program.graph.nodes if n.op != "placeholder"}
        self.names: dict[fx.Node, str] = {}
        for node in placeholders(program.gm):
            name = wanted = re.sub(r"\W+", "_", self._wanted(node)).strip("_") or node.name
            number = 2
            while name in taken or keyword.iskeyword(name) or name[0].isdigit():
                name, number = f"{wanted}_{number}" if not wanted[0].isdigit() else f"p_{wanted}", number + 1
            taken.add(name)
            self.names[node] = name

    def _wanted(self, node: fx.Node) -> str:
        tensors = self.tensors
        if not isinstance(tensors, FromInputs):
            return argument_name(node)
        origin, what = tensors.origin(node)
        if origin == "recalled":
            return str(what)
        if origin == "derived":
            for source in tensors.inputs_nodes:
                if node.name.startswith(f"{source.name}_") and source in self.names:
                    return self.names[source] + node.name.removeprefix(source.name)
            return node.name
        return tensors.path(node) or argument_name(node)

    def function(self) -> str:
        lines = ["def forward("]
        lines += [f"    {self._input(node)}" for node in placeholders(self.program.gm)]
        lines.append("):")
        path: str | None = None
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                lines += ["", f"    return {self._argument(node.args[0])}"]
                continue
            here = module_path(node)
            if here and here != path:
                lines += ["", f"    # {here}"]
                path = here
            lines += [f"    {line}" for line in self._statement(node)]
        return "\n".join(lines) + "\n"

    def _input(self, node: fx.Node) -> str:
        tensors = self.tensors
        origin, what = tensors.origin(node) if isinstance(tensors, FromInputs) else ("argument", None)
        if tensors.is_state(node):
            about = "state that lives between calls"
        elif origin == "derived":
            about = f"made of {tensors.path(node)}"
        elif origin == "recalled":
            about = f"kept by an earlier step as {what!r}"
        else:
            kind = tensors.kind(node) if isinstance(tensors, FromInputs) else None
            about = f"{kind} {tensors.path(node)}" if kind else ""
        line = f'{self.names[node]}: "{said(value(node))}",'
        return _commented(line, about)

    def _statement(self, node: fx.Node) -> Iterator[str]:
        if is_attention(node):
            yield from (f"# {line}" for line in spec_in_words(spec_of(node)))
        made = said(value(node)) if value(node) is not None else ""
        if node.op == "get_attr":
            path = str(node.target)
            plain = all(part.isidentifier() for part in path.split("."))
            text = f"{node.name} = self.{path}" if plain else f"{node.name} = self[{path!r}]"
        elif node.target is operator.getitem:
            text = f"{node.name} = {self._argument(node.args[0])}[{self._argument(node.args[1])}]"
        elif made:
            text = f"{node.name} = {self._called(node)}"
        else:
            text = self._called(node)
        yield _commented(text, made)

    def _called(self, node: fx.Node) -> str:
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        given = [self._argument(a) for a in node.args]
        if schema is not None and str(target).startswith("accelpass."):
            # What is no tensor is a setting of ours, which says nothing without its name.
            names = [a.name for a in schema.arguments]
            for at, argument in enumerate(node.args):
                if not _has_node(argument):
                    given[at:] = [f"{n}={self._argument(a)}" for n, a in zip(names[at:], node.args[at:], strict=False)]
                    break
            if is_attention(node):
                given[-1] = "spec=..."
            if is_packed(node):
                given = [f"spec={linear_spec(node).shown()}" if g.startswith("spec=") else g for g in given]
        given += [f"{k}={self._argument(v)}" for k, v in node.kwargs.items()]
        return f"{_name(target)}({', '.join(given)})"

    def _argument(self, what: Any) -> str:
        if isinstance(what, fx.Node):
            return self.names.get(what, what.name)
        if isinstance(what, tuple) and hasattr(what, "_fields"):
            return f"{type(what).__name__}({', '.join(map(self._argument, what))})"
        if isinstance(what, tuple):
            return f"({', '.join(map(self._argument, what))}{',' if len(what) == 1 else ''})"
        if isinstance(what, list):
            return f"[{', '.join(map(self._argument, what))}]"
        if isinstance(what, dict):
            return "{" + ", ".join(f"{k!r}: {self._argument(v)}" for k, v in what.items()) + "}"
        if isinstance(what, slice):
            return f"slice({self._argument(what.start)}, {self._argument(what.stop)}, {self._argument(what.step)})"
        if isinstance(what, torch.device):
            return repr(str(what))
        if isinstance(what, float) and what in (float("inf"), float("-inf")):
            return f'float("{what}")'
        if isinstance(what, torch.dtype | torch.layout | torch.memory_format):
            return str(what)
        if what is None or isinstance(what, str | bool | int | float):
            return repr(what)
        return repr(str(what))


def _commented(text: str, comment: str) -> str:
    return f"{text:<{_COLUMN}}  # {comment}" if comment else text


def _has_node(argument: Any) -> bool:
    return any(isinstance(a, fx.Node) for a in tree_leaves(argument))


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
    name = name.replace("<", "").replace(">", "")
    return name if module in (None, builtins.__name__) else f"{module}.{name}"
