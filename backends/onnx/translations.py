"""How the library's own operators pass through torch's ONNX exporter: as nodes of a domain of ours, expanded afterwards.

The activation stays inside such a node until torch's exporter and the optimiser are through with the graph, so that neither
sees a dequantised weight: a function of constants alone, which they would fold into floats. What the nodes become is in
``packed_weights``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from accelpass.backends.onnx.torch_gaps import gaps
from accelpass.ir.weight_only_ops import (
    int4_embedding,
    int4_linear,
    int4_matrix,
    int8_embedding,
    int8_linear,
    int8_matrix,
)

DOMAIN = "accelpass"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_CODES = ["tensor(int8)", "tensor(uint8)"]
_REGISTERED: dict[Any, Callable[..., Any]] = {}


def register_translation(op: Any, function: Callable[..., Any]) -> None:
    """Say how an operator of a pass is written in ONNX.

    Args:
        op: an overload, ``torch.ops.mine.packed_linear.default``.
        function: an onnxscript function of the op's arguments, as ``torch.onnx.export`` takes them in its
            ``custom_translation_table``. A weight that it dequantises must stay behind a ``DequantizeLinear``: other operators
            on constants are folded, and the export then refuses the file that has grown.

    Raises:
        ValueError: the op has a translation already.
    """
    if op in _REGISTERED or op in _own():
        raise ValueError(f"{op} has a translation already")
    _REGISTERED[op] = function


def table() -> Mapping[Any, Callable[..., Any]]:
    """Translations by operator, for ``torch.onnx.export``."""
    return {**gaps(), **_own(), **_REGISTERED}


def _own() -> dict[Any, Callable[..., Any]]:
    linear = {"x": _FLOATS, "q": _CODES, "scale": _FLOATS}
    lookup = {"indices": ["tensor(int64)", "tensor(int32)"], "q": _CODES, "scale": _FLOATS}
    matrix = {"q": _CODES, "scale": _FLOATS}
    zero, bias = {"zero?": _FLOATS}, {"bias?": _FLOATS}
    int8_l = _node("Int8Linear", linear | bias, [])
    int8_e = _node("Int8Embedding", lookup, ["dtype"])
    int8_m = _node("Int8Matrix", matrix, ["dtype"])
    int4_l = _node("Int4Linear", linear | zero | bias, ["group_size"])
    int4_e = _node("Int4Embedding", lookup | zero, ["group_size", "dtype"])
    int4_m = _node("Int4Matrix", matrix | zero, ["group_size", "dtype"])
    return {
        int8_linear._opoverload: lambda x, q, scale, bias: int8_l(x, q, scale, bias),
        int8_embedding._opoverload: lambda indices, q, scale, dtype: int8_e(indices, q, scale, dtype=dtype),
        int8_matrix._opoverload: lambda q, scale, dtype: int8_m(q, scale, dtype=dtype),
        int4_linear._opoverload: lambda x, q, scale, zero, bias, group: int4_l(
            x, q, scale, zero, bias, group_size=group
        ),
        int4_embedding._opoverload: lambda indices, q, scale, zero, group, dtype: int4_e(
            indices, q, scale, zero, group_size=group, dtype=dtype
        ),
        int4_matrix._opoverload: lambda q, scale, zero, group, dtype: int4_m(
            q, scale, zero, group_size=group, dtype=dtype
        ),
    }


def _node(name: str, inputs: Mapping[str, list[str]], attributes: list[str]) -> Any:
    """An operator of our domain that onnxscript can record: it wants a schema of each."""
    import onnxscript
    from onnx.defs import OpSchema

    parameters = []
    for index, (key, types) in enumerate(inputs.items()):
        optional = key.endswith("?")
        option = OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single
        parameters.append((OpSchema.FormalParameter(key.rstrip("?"), f"T{index}", param_option=option), types))
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[p for p, _ in parameters],
        outputs=[OpSchema.FormalParameter("y", "TY")],
        type_constraints=[*((f"T{i}", types, "") for i, (_, types) in enumerate(parameters)), ("TY", _FLOATS, "")],
        attributes=[OpSchema.Attribute(a, OpSchema.AttrType.INT, required=True) for a in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


def own_operators(graph: torch.fx.Graph) -> list[str]:
    """Custom operators of a graph that have no translation."""
    known = table()
    found: dict[str, None] = {}
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target in known:
            continue
        if target.namespace not in ("aten", "prims", "onnx", "onnx_symbolic", "quantized_decomposed", "torchvision"):
            found[str(target)] = None
    return list(found)
