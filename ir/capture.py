"""Two doors into one IR: a Dynamo graph and an exported program both become pre-dispatch ATen.

Dynamo's graph has many spellings for one operation (``@``, ``torch.matmul``, ``.matmul``); retracing it gives one, the
same as ``torch.export``'s. Dynamo still owns the graph that it passes to a backend, so nothing here edits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import AttrSource, ConstantSource, DictGetItemSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.errors import AccelpassError
from accelpass.ir.graph import clean_path, placeholders, value
from accelpass.ir.program import Program
from accelpass.ir.tensors import FromInputs, FromModule

_DATA = getattr(torch._C._autograd, "_get_data_attr", None)
_TABLES = {"_parameters": "param", "_buffers": "buffer", "_modules": None}


class NotCanonical(AccelpassError):
    """The graph could not be retraced; it can still be compiled as it is."""


def path_of(source: Any) -> tuple[str, str] | None:
    """(path, ``param`` or ``buffer``) of a Dynamo source, or None for anything that is not module state."""
    parts: list[str] = []
    kind = None
    while source is not None:
        base = getattr(source, "base", None)
        table = getattr(base, "member", None)
        if isinstance(base, DictGetItemSource) and getattr(base.base, "member", None) == "__dict__":
            # A class with a __getattr__ of its own (diffusers' models): Dynamo looks the table up in __dict__.
            table, base = base.index, base.base
        if isinstance(source, DictGetItemSource) and table in _TABLES:
            parts.append(str(source.index))
            kind = kind or _TABLES[table]
            source = getattr(base, "base", None)
        elif kind and type(source) is AttrSource:
            parts.append(source.member)
            source = base
        elif kind:
            source = base
        else:
            return None
    return (clean_path(".".join(reversed(parts))), kind) if kind else None


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph; ``x.data`` is no operator that a tracer sees, so it is run as the ``detach`` that it is."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _DATA:
            return args[0].detach()
        return super().call_function(target, args, kwargs)


def from_dynamo(
    gm: fx.GraphModule, example_inputs: Sequence[Any], at: FakeTensorMode | None = None, guarded: bool = False
) -> Program:
    """Capture what Dynamo gave to a backend.

    Args:
        gm: Dynamo's graph; left untouched.
        example_inputs: the real inputs, model parameters among them.
        at: capture for the very sizes of ``example_inputs``, faked in this mode; None for those that Dynamo chose,
            which may be symbolic.
        guarded: with ``at``, take numbers (a scale) that Dynamo made symbolic as they are, too, and guard that they stay so;
            while Dynamo compiles alone.

    Raises:
        NotCanonical: the graph cannot be retraced (it holds batched tensors, for one); the cause is chained.
    """
    old = placeholders(gm)
    if at is None:
        fakes = [n.meta["example_value"] for n in old]
    else:
        fakes = [at.from_tensor(t, static_shapes=True) if isinstance(t, Tensor) else t for t in example_inputs]
        if guarded:
            for node, fake in zip(old, fakes, strict=True):
                number = getattr(node.meta["example_value"], "item_memo", None)
                if isinstance(number, torch.SymFloat):
                    fake.item_memo = float(number)
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if mode is None:
        raise NotCanonical("the graph has no tensor inputs")
    try:
        with mode, fx.traceback.preserve_node_meta():
            new = make_fx(lambda *a: _Interpreter(gm).run(*a), pre_dispatch=True)(*fakes)
    except Exception as cause:  # anything an op's tracing may raise; the caller compiles the graph unrewritten
        raise NotCanonical(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}") from cause
    paths: dict[fx.Node, tuple[str, str]] = {}
    for o, n in zip(old, placeholders(new), strict=True):
        n._dynamo_source = source = getattr(o, "_dynamo_source", None)
        n.meta["tensor_dict"] = o.meta.get("tensor_dict") or {}
        if n.meta["tensor_dict"].get("_dynamo_static_input_type"):
            # A tensor kept as a plain attribute has no table in its source, yet is model state like a parameter.
            paths[n] = path_of(source) or (clean_path(str(source.name) if source else n.name), "constant")
    new.meta.update(gm.meta)
    new._param_name_to_source = dict(getattr(gm, "_param_name_to_source", {}))  # type: ignore[assignment]
    for name, _ in new.named_buffers():
        new._param_name_to_source.setdefault(name, ConstantSource(name))  # type: ignore[operator, union-attr]
    _drop_noise(new)
    held = (getattr(new, str(n.target), None) for n in new.graph.find_nodes(op="get_attr"))
    if any(isinstance(t, FakeTensor) for t in held):
        # A value computed under a transform (vmap inside a scan) came out without its computation.
        raise NotCanonical("retracing lost how a value is computed, as it does inside associative_scan")
    return Program(new, FromInputs(new, example_inputs, paths), "dynamo")


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """Capture an exported program; weights are ``get_attr`` nodes that keep their paths."""
    gm = exported.module(check_guards=False)
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes}
    mode = next((v.fake_mode for v in values.values() if isinstance(v, FakeTensor)), None)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta and mode is not None:
            held: Any = gm
            for part in str(node.target).split("."):
                held = getattr(held, part, None)
            if isinstance(held, Tensor):
                node.meta["val"] = mode.from_tensor(held, static_shapes=True)
    _share(gm)
    _drop_noise(gm)
    return Program(gm, FromModule(gm), "export")


def _share(gm: fx.GraphModule) -> None:
    """One node for a tensor that the model has under several names (a tied embedding), as Dynamo's graph has."""
    first: dict[Any, fx.Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        held: Any = gm
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        if not isinstance(held, Tensor):
            continue
        key = (held.data_ptr(), held.shape, held.stride(), held.dtype) if held.data_ptr() else id(held)
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            gm.graph.erase_node(node)


def _drop_noise(gm: fx.GraphModule) -> None:
    """Remove what has no meaning for inference: unused values, detach, dropout that does nothing."""
    aten = torch.ops.aten
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        off = node.target in (aten.dropout.default, aten.feature_dropout.default) and (
            node.args[1] == 0 or node.args[2] is False
        )
        if off or (node.target in (aten.detach.default, aten.alias.default) and not _has_own_metadata(node)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.target is aten.type_as.default or (node.target is aten.to.dtype and len(node.args) == 2):
            _plain_cast(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _has_own_metadata(node: fx.Node) -> bool:
    """Whether it matters that this alias is a tensor of its own: it is returned, or it or what it aliases is given another shape
    in place (``unsqueeze_``)."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    mine = _same_tensor(node)
    return any(u.op == "output" for n in mine for u in n.users) or any(
        torch.Tag.inplace_view in getattr(n.target, "tags", ()) for n in (*mine, *_same_tensor(source)[1:])
    )


def _same_tensor(node: fx.Node) -> list[fx.Node]:
    """``node``, and what writes to it in place return, which is the same tensor."""
    found = [node]
    for user in node.users:
        if isinstance(user.target, torch._ops.OpOverload) and user.args[:1] == (node,):
            schema = user.target._schema
            if schema.returns and schema.returns[0].alias_info is not None and schema.returns[0].alias_info.is_write:
                found += _same_tensor(user)
    return found


def _plain_cast(node: fx.Node) -> None:
    """A cast to a dtype that is named, not to that of a tensor, which would have to be computed for it; none to its own."""
    aten = torch.ops.aten
    given, like = node.args[0], value(node.args[1])
    assert isinstance(given, fx.Node)
    if isinstance(like, Tensor):
        if value(given).device != like.device:
            return
        node.target, node.args = aten.to.dtype, (given, like.dtype)
    if value(given).dtype == node.args[1] and not node.kwargs:
        node.replace_all_uses_with(given)
        node.graph.erase_node(node)
