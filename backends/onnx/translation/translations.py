"""How the library's own operators pass through torch's ONNX exporter: as nodes of a domain of ours, expanded afterwards.

The activation stays inside such a node until torch's exporter and the optimiser are through with the graph, so that neither
sees a dequantised weight: a function of constants alone, which they would fold into floats. What the nodes become is in
``packed_weights``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from accelpass.backends.onnx.translation.torch_gaps import gaps
from accelpass.ir.linear.op import EMBEDDING, LINEAR, MATRIX
from accelpass.ir.torch_private import OpOverload

DOMAIN = "accelpass"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INTEGERS = ["tensor(int8)", "tensor(uint8)", "tensor(int32)", "tensor(int64)"]
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
    """A node for each op, whose inputs are x or the indices, the packed weight, and the bias if there is one."""
    linear, lookup = _node("Linear", {"spec": "STRING"}), _node("Embedding", {"spec": "STRING", "dtype": "INT"})
    matrix = _node("Matrix", {"spec": "STRING", "dtype": "INT"})
    return {
        LINEAR: lambda x, operands, bias, spec: linear(x, *operands, *([] if bias is None else [bias]), spec=spec),
        EMBEDDING: lambda indices, operands, spec, dtype: lookup(indices, *operands, spec=spec, dtype=dtype),
        MATRIX: lambda operands, spec, dtype: matrix(*operands, spec=spec, dtype=dtype),
    }


def _node(name: str, attributes: Mapping[str, str]) -> Any:
    """An operator of our domain that onnxscript can record: it wants a schema of each."""
    import onnxscript
    from onnx.defs import OpSchema

    read = OpSchema.FormalParameter(
        "inputs", "TX", param_option=OpSchema.FormalParameterOption.Variadic, is_homogeneous=False
    )
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[read],
        outputs=[OpSchema.FormalParameter("y", "TY")],
        type_constraints=[("TX", [*_FLOATS, *_INTEGERS], ""), ("TY", _FLOATS, "")],
        attributes=[OpSchema.Attribute(a, getattr(OpSchema.AttrType, t), required=True) for a, t in attributes.items()],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


def own_operators(graph: torch.fx.Graph) -> list[str]:
    """Custom operators of a graph that have no translation."""
    known = table()
    found: dict[str, None] = {}
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, OpOverload) or target in known:
            continue
        if target.namespace not in ("aten", "prims", "onnx", "onnx_symbolic", "quantized_decomposed", "torchvision"):
            found[str(target)] = None
    return list(found)
