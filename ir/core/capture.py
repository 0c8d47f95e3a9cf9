"""Two frontends of one IR: a Dynamo graph and an exported program both become pre-dispatch ATen.

Dynamo's graph has many spellings for one operation (``@``, ``torch.matmul``, ``.matmul``); retracing it gives one, the
same as ``torch.export``'s. Dynamo still owns the graph that it passes to a backend, so nothing here edits it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.core.canonical import autocast, batched
from accelpass.ir.core.canonical.aliases import drop_aliases, functional_views
from accelpass.ir.core.graph import clean_path, placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs, FromModule
from accelpass.ir.errors import AccelpassError
from accelpass.ir.torch_private import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    GET_DATA,
    FakeTensor,
    FakeTensorMode,
    copy_sources,
    is_model_state,
    name_buffers,
    path_of,
    source_of,
    switches_forward_gradients,
    traced_code,
)


class NotCanonical(AccelpassError):
    """The graph could not be retraced; it can still be compiled as it is."""


def model_path(node: fx.Node) -> tuple[str, str] | None:
    """Path and kind of an input of Dynamo's graph; None for what the caller passes."""
    if not is_model_state(node):
        return None
    source = source_of(node)
    # A tensor kept as a plain attribute has no table in its source, yet is model state like a parameter.
    path, kind = path_of(source) or (str(source.name) if source else node.name, "constant")
    return clean_path(path), kind


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph.

    ``x.data`` is no operator that a tracer sees, so it is run as the ``detach`` that it is. A tracer would record that
    autocast is switched, and not switch it; what follows would then have other dtypes than the model's. What a ``vmap``
    computes is run as it was written out.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.regions: list[torch.autocast] = []
        self.plain: dict[fx.Node, tuple[batched.Stretch, fx.GraphModule]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.plain:
            return super().run_node(n)
        stretch, computes = self.plain[n]
        made = computes(*(self.env[given] for given in stretch.inputs))
        self.env |= dict.fromkeys(stretch.nodes) | dict(zip(stretch.outputs, made, strict=True))
        return self.env[n]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is GET_DATA:
            return args[0].detach()
        if target is ENTER_AUTOCAST:
            device, dtype, enabled, cache = args
            region = torch.autocast(device, dtype, enabled, cache)
            self.regions.append(region.__enter__())
            return region
        if target is EXIT_AUTOCAST:
            return self.regions.pop().__exit__(None, None, None)
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
    if any(n.op == "call_function" and switches_forward_gradients(n.target) for n in gm.graph.nodes):
        raise NotCanonical("it computes forward-mode gradients, which live outside the graph")
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
    around = gm.meta.get(autocast.AROUND, {})
    interpreter = _Interpreter(gm)
    try:
        with autocast.switched(around), mode, fx.traceback.preserve_node_meta():
            interpreter.plain = batched.written_out(gm, fakes, _Interpreter)
            new = make_fx(lambda *a: interpreter.run(*a), pre_dispatch=True)(*fakes)
        autocast.resolve(new, around)
        functional_views(new)
        _keep_assertions(gm, new)
    except Exception as cause:  # anything an op's tracing may raise; the caller compiles the graph unrewritten
        raise NotCanonical(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}") from cause
    finally:
        while interpreter.regions:
            interpreter.regions.pop().__exit__(None, None, None)
    paths: dict[fx.Node, tuple[str, str]] = {}
    for o, n in zip(old, placeholders(new), strict=True):
        n.meta["tensor_dict"] = o.meta.get("tensor_dict") or {}
        if (found := model_path(o)) is not None:
            paths[n] = found
    new.meta.update(gm.meta)
    copy_sources(dict(zip(old, placeholders(new), strict=True)))
    name_buffers(new, gm)
    _drop_noise(new)
    held = (getattr(new, str(n.target), None) for n in new.graph.find_nodes(op="get_attr"))
    if any(isinstance(t, FakeTensor) for t in held):
        # A value computed under a transform (vmap inside a scan) came out without its computation.
        raise NotCanonical("retracing lost how a value is computed, as it does inside associative_scan")
    return Program(new, FromInputs(new, example_inputs, paths), "dynamo", cut=cut_by(gm))


def cut_by(gm: fx.GraphModule) -> str:
    """The graph break that made Dynamo's graph a piece of the model, by file, line and reason; empty if there is none.

    Dynamo says why a graph ends; that it begins in the middle is told by the name of the function that it goes on in.
    """
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is not None and why.graph_break:
        at = why.user_stack[-1] if why.user_stack else None
        place = f"{at.filename}:{at.lineno}, in {at.name}" if at is not None else "a place that Dynamo does not name"
        return f"{place}: {str(why.reason).splitlines()[0]}"
    code = traced_code()
    resumed = re.fullmatch(r"torch_dynamo_resume_in_(.*)_at_(\d+)", code.co_name) if code is not None else None
    return "" if code is None or resumed is None else f"{code.co_filename}:{resumed[2]}, in {resumed[1]}"


def cut_said(program: Program) -> str:
    """What a user must know of a graph that is a piece of the model; empty if it is the whole."""
    if not program.cut:
        return ""
    return (
        f"this graph is only a piece of the model: a graph break cut it at {program.cut}. "
        "Take out what Dynamo cannot trace there; torch.compile(..., fullgraph=True) stops at the first such place"
    )


def _keep_assertions(gm: fx.GraphModule, retraced: fx.GraphModule) -> None:
    """Refuse a graph whose assertions on values that only a call shows were taken for true while it was retraced."""
    target = torch.ops.aten._assert_scalar.default

    def open_assertions(graph: fx.Graph) -> int:
        return sum(isinstance(n.args[0], fx.Node) for n in graph.find_nodes(op="call_function", target=target))

    if open_assertions(retraced.graph) < open_assertions(gm.graph):
        raise NotCanonical("it asserts something of a value that only a call shows")


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """Capture an exported program; weights are ``get_attr`` nodes that keep their paths."""
    gm = exported.module(check_guards=False)
    autocast.unwrap(gm)
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes}
    mode = next((v.fake_mode for v in values.values() if isinstance(v, FakeTensor)), None)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta and mode is not None:
            held: Any = gm
            for part in str(node.target).split("."):
                held = getattr(held, part, None)
            if isinstance(held, Tensor):
                node.meta["val"] = mode.from_tensor(held, static_shapes=True)
    autocast.resolve(gm, {})
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
    """Remove what has no meaning for inference: unused values, aliases, dropout that does nothing."""
    aten = torch.ops.aten
    drop_aliases(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.dropout.default, aten.feature_dropout.default) and (
            node.args[1] == 0 or node.args[2] is False
        ):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.target is aten.type_as.default or (node.target is aten.to.dtype and len(node.args) == 2):
            _plain_cast(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


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
