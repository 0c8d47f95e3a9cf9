"""What the nodes on packed weights become: operators of the standard, or ONNX Runtime's, on the integers that the pass made.

========== ============================================= =====================================================
            standard                                      ``contrib=True``
========== ============================================= =====================================================
linear     ``DequantizeLinear`` -> ``MatMul``             ``com.microsoft.MatMulNBits``; int8 as two of 4 bits
look-up    ``Gather`` of rows of codes, then arithmetic   the same, on the codes that ``MatMulNBits`` reads
experts    ``DequantizeLinear``                           the same
========== ============================================= =====================================================

ONNX Runtime makes ``MatMulNBits`` of ``DequantizeLinear`` -> ``MatMul`` when a session is made, and rounds activations to int8
there: several times faster, and on SmolLM2 a model that answers nonsense. It does so where the weight is stored as (in, out);
a weight (out, in) with a ``Transpose`` it leaves alone. Which of the two is written is the caller's choice.

A weight that is both looked up and multiplied (a tied output head) is stored once, but for one case: no standard operator looks
up rows of an INT4 tensor, so int4 codes are stored once for each use then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from accelpass.backends.export.errors import ExportError
from accelpass.backends.onnx.translation.translations import DOMAIN
from accelpass.ir.linear.formats import Int4, Int8
from accelpass.ir.linear.spec import LinearSpec

MICROSOFT = "com.microsoft"
OPSET = 21
"""The first whose DequantizeLinear takes int4 and blocks."""
_FLOAT, _ROUNDED = 1, 4
"""``accuracy_level`` of MatMulNBits: products of floats, as the pass defines them; activations rounded to int8 by blocks."""
FORMATS = (Int8.part, Int4.part)
"""Of weights, that are written as they are; others are unpacked by the graph."""
_BLOCKS = (256, 128, 64, 32, 16)


@dataclass
class Expansion:
    """Expands the nodes of one graph.

    Attributes:
        contrib: use ONNX Runtime's own operators.
        rounded: ONNX Runtime may round activations to int8.
        notes: what a reader of the report should know.
    """

    model: ir.Model
    contrib: bool
    rounded: bool = False
    notes: list[str] = field(default_factory=list)
    _forms: dict[tuple[str, str], ir.Value] = field(default_factory=dict)

    def run(self) -> None:
        """Expand every node, and forget the forms that nothing reads any more."""
        nodes = [n for n in self.model.graph.all_nodes() if n.domain == DOMAIN]
        if not nodes:
            return
        multiplied, looked_up = set(), set()
        # Look-ups last: they read the form that a product of the same weight has.
        for node in sorted(nodes, key=lambda n: n.op_type != "Linear"):
            weight = LinearSpec.from_json(node.attributes["spec"].as_string()).weight
            at, count = int(node.op_type != "Matrix"), len(weight.operands)
            first, packed, rest = node.inputs[:at], node.inputs[at : at + count], node.inputs[at + count :]
            self._functions()[node.op_type, weight.part](Emit(node), weight, *first, *packed, *rest)
            if node.op_type == "Linear":
                multiplied.add(_name(packed[0]))
            elif node.op_type == "Embedding" and isinstance(weight, Int4):
                looked_up.add(_name(packed[0]))
        for name in sorted(multiplied & looked_up if not self.contrib else ()):
            size = self._forms[name, "rows"].const_value
            assert size is not None
            self.notes.append(
                f"{name} is stored twice ({size.nbytes / 1e6:.1f} MB more): no standard operator looks up rows of an INT4 "
                "tensor; contrib=True stores it once"
            )
        self.model.opset_imports.pop(DOMAIN, None)
        if any(n.domain == MICROSOFT for n in self.model.graph.all_nodes()):
            self.model.opset_imports[MICROSOFT] = 1
        for name in [n for n, v in self.model.graph.initializers.items() if not v.uses()]:
            if not self.model.graph.initializers[name].is_graph_output():
                del self.model.graph.initializers[name]

    def _functions(self) -> dict[tuple[str, str], Callable[..., None]]:
        return {
            ("Linear", Int8.part): self._int8_linear,
            ("Embedding", Int8.part): self._int8_embedding,
            ("Matrix", Int8.part): self._int8_matrix,
            ("Linear", Int4.part): self._int4_linear,
            ("Embedding", Int4.part): self._int4_embedding,
            ("Matrix", Int4.part): self._int4_matrix,
        }

    def _int8_linear(self, e: Emit, weight: Int8, x: Any, q: Any, scale: Any, bias: Any = None) -> None:
        if x.dtype == ir.DataType.INT8:
            columns = self._form(q, "columns", lambda codes: codes.T)
            y = e("Mul", e.float(e("MatMulInteger", x, columns), known=False), scale)
        elif self.contrib and self.rounded:
            y = self._n_bits(e, x, q, 8, _block_of(q), self._block_scales(q, scale), None)
        elif self.contrib:
            y = self._two_planes(e, x, q, scale)
        else:
            whole = self.rounded or (x.producer() is not None and x.producer().op_type == "DequantizeLinear")
            if whole:  # the form that ONNX Runtime multiplies as integers
                columns = self._form(q, "columns", lambda codes: codes.T)
                w = e("DequantizeLinear", columns, scale, axis=1)
            else:
                # One block a row: through a scale for each channel ONNX Runtime would move the transposition.
                scales = self._form(scale, "stacked", lambda s: s[..., None])
                w = e("DequantizeLinear", q, scales, axis=1, block_size=int(_array(q).shape[1]))
            y = self._product(e, x, w, whole)
        e.finish(y, bias, x)

    def _int8_embedding(self, e: Emit, weight: Int8, indices: Any, q: Any, scale: Any) -> None:
        width = _array(q).shape[1]
        if (_name(q), "n bits") in self._forms:
            rows = self._gathered(e, self._forms[_name(q), "n bits"], indices, width)
            codes = e("Sub", e.float(rows, known=False), e.scalar(128.0))
        elif (_name(q), "high") in self._forms:
            high, low = (self._looked_up(e, self._forms[_name(q), plane], indices, width) for plane in ("high", "low"))
            codes = e("Sub", e("Add", e("Mul", high, e.scalar(16.0)), low), e.scalar(128.0))
        elif (_name(q), "columns") in self._forms:
            taken = e("Gather", self._forms[_name(q), "columns"], indices, axis=1)
            codes = e.float(e("Transpose", taken, perm=[*range(1, 1 + _rank(indices)), 0]), known=False)
        else:
            codes = e.float(e("Gather", q, indices, axis=0), known=False)
        scales = e("Unsqueeze", e("Gather", scale, indices, axis=0), e.ints(-1))
        e.finish_as(e("Mul", codes, scales))

    def _int8_matrix(self, e: Emit, weight: Int8, q: Any, scale: Any) -> None:
        scales = self._form(scale, "stacked", lambda s: s[..., None])
        e.finish_as(e("DequantizeLinear", q, scales, axis=-1, block_size=int(_array(q).shape[-1])))

    def _int4_linear(self, e: Emit, weight: Int4, x: Any, q: Any, scale: Any, *more: Any) -> None:
        zero, bias = (*([] if not weight.symmetric else [None]), *more, None)[:2]
        group = weight.group_size
        if self.contrib:
            points = None if zero is None else self._form(zero, "packed", lambda z: _packed(_whole(z)))
            y = self._n_bits(e, x, q, 4, group, scale, points, group)
        else:
            symmetric, form = zero is None, "columns" if self.rounded else "int4"

            def turned(array: np.ndarray) -> np.ndarray:
                return array.T if self.rounded else array

            codes = self._form(q, form, lambda codes: _int4(turned(_nibbles(codes, group)), symmetric))
            scales = self._form(scale, form, turned) if self.rounded else scale
            points = [] if zero is None else [self._form(zero, form, lambda z: _int4(turned(_whole(z)), False))]
            axis = int(not self.rounded)
            y = self._product(
                e, x, e("DequantizeLinear", codes, scales, *points, axis=axis, block_size=group), self.rounded
            )
        e.finish(y, bias, x)

    def _int4_embedding(self, e: Emit, weight: Int4, indices: Any, q: Any, scale: Any, zero: Any = None) -> None:
        group, width = weight.group_size, 2 * _array(q).shape[1]
        form = "n bits" if (_name(q), "n bits") in self._forms else "rows"
        packed = self._form(q, form, lambda codes: _packed(_nibbles(codes, group)))
        flat = self._looked_up(e, packed, indices, width)
        codes = e("Reshape", flat, e("Concat", e("Shape", indices), e.ints(width // group, group), axis=0))

        def of_groups(values: ir.Value) -> ir.Value:
            return e("Unsqueeze", e("Gather", values, indices, axis=0), e.ints(-1))

        offset = e.scalar(8.0) if zero is None else of_groups(zero)
        wide = e("Mul", e("Sub", codes, offset), of_groups(scale))
        e.finish_as(e("Reshape", wide, e("Concat", e("Shape", indices), e.ints(width), axis=0)))

    def _int4_matrix(self, e: Emit, weight: Int4, q: Any, scale: Any, zero: Any = None) -> None:
        group, symmetric = weight.group_size, zero is None
        codes = self._form(q, "stacked", lambda codes: _int4(_nibbles(codes, group), symmetric))
        points = [] if zero is None else [self._form(zero, "stacked", lambda z: _int4(_whole(z), False))]
        e.finish_as(e("DequantizeLinear", codes, scale, *points, axis=-1, block_size=group))

    def _product(self, e: Emit, x: ir.Value, w: ir.Value, turned: bool) -> ir.Value:
        """``x`` times the weight, which is (in, out) if ``turned``, else (out, in)."""
        return e("MatMul", e.float(x), w if turned else e("Transpose", w, perm=[1, 0]))

    def _n_bits(
        self, e: Emit, x: ir.Value, q: ir.Value, bits: int, block: int, scale: ir.Value, points: Any, group: int = 0
    ) -> ir.Value:
        """``MatMulNBits``: codes as (out, blocks, bytes of a block), the first of two in the low nibble."""

        def blocks(codes: np.ndarray) -> np.ndarray:
            stored = (codes.astype(np.int16) + 128).astype(np.uint8) if bits == 8 else _packed(_nibbles(codes, group))
            return _blocks(stored, block * bits // 8, 128 if bits == 8 else 0)

        rows, columns = _array(q).shape
        width = columns if bits == 8 else 2 * columns
        given = [e.float(x), self._form(q, "n bits", blocks), scale, *([points] if points is not None else [])]
        sizes = {"K": width, "N": int(rows), "bits": bits, "block_size": block}
        return e("MatMulNBits", *given, domain=MICROSOFT, accuracy_level=_ROUNDED if self.rounded else _FLOAT, **sizes)

    def _two_planes(self, e: Emit, x: ir.Value, q: ir.Value, scale: ir.Value) -> ir.Value:
        """An int8 product as two of four bits: ``W = (16 high + low - 128) scale``, in the same bytes.

        Of floats ONNX Runtime 1.31 multiplies 4-bit weights by kernels of its own, and dequantises 8-bit ones at every call.
        """
        width, count = _array(q).shape[1], -(-_array(q).shape[1] // _block_of(q))

        def plane(shift: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda codes: _blocks(_packed(((codes.astype(np.int16) + 128) >> shift & 15).astype(np.uint8)), size)

        size = _block_of(q) // 2
        high, low = self._form(q, "high", plane(4)), self._form(q, "low", plane(0))
        scales = self._block_scales(q, scale)
        wide = self._form(scale, "high blocks", lambda s: np.repeat(16 * s[:, None], count, 1))
        zeros = self._form(scale, "zeros", lambda s: np.zeros((len(s), -(-count // 2)), np.uint8))
        sizes = {
            "K": width,
            "N": int(_array(q).shape[0]),
            "bits": 4,
            "block_size": _block_of(q),
            "accuracy_level": _FLOAT,
        }
        given = e.float(x)
        return e(
            "Add",
            e("MatMulNBits", given, high, wide, domain=MICROSOFT, **sizes),
            e("MatMulNBits", given, low, scales, zeros, domain=MICROSOFT, **sizes),
        )

    def _block_scales(self, q: ir.Value, scale: ir.Value) -> ir.Value:
        """One scale for each output row, repeated for each block of it."""
        count = -(-_array(q).shape[1] // _block_of(q))
        return self._form(scale, "blocks", lambda s: np.repeat(s[:, None], count, 1))

    def _looked_up(self, e: Emit, packed: ir.Value, indices: ir.Value, width: int) -> ir.Value:
        """Rows of two codes a byte, one code a number: float32 ``(*indices, width)``."""
        rows = self._gathered(e, packed, indices, width // 2)
        low = e("BitwiseAnd", rows, e.constant(np.uint8(15)))
        high = e("BitShift", rows, e.constant(np.uint8(4)), direction="RIGHT")
        pairs = e("Concat", *(e("Unsqueeze", half, e.ints(-1)) for half in (low, high)), axis=-1)
        flat = e("Reshape", pairs, e("Concat", e("Shape", indices), e.ints(width), axis=0))
        return e.float(flat, known=False)

    def _gathered(self, e: Emit, blocks: ir.Value, indices: ir.Value, width: int) -> ir.Value:
        """Rows of what ``MatMulNBits`` reads, ``(*indices, width)``."""
        rows = e("Gather", blocks, indices, axis=0)
        flat = e("Reshape", rows, e("Concat", e("Shape", indices), e.ints(-1), axis=0))
        return e("Slice", flat, e.ints(0), e.ints(width), e.ints(-1))

    def _form(self, value: ir.Value, form: str, make: Callable[[np.ndarray], np.ndarray]) -> ir.Value:
        """Another form of an initializer, made once."""
        key = (_name(value), form)
        if key not in self._forms:
            name = f"{key[0]}.{form.replace(' ', '_')}"
            made = np.ascontiguousarray(make(_array(value)))
            self._forms[key] = new = ir.Value(name=name, const_value=ir.tensor(made, name=name))
            assert new.const_value is not None
            new.shape, new.dtype = ir.Shape(made.shape), new.const_value.dtype
            self.model.graph.register_initializer(new)
        return self._forms[key]


class Emit:
    """Puts nodes in front of the one that they replace."""

    def __init__(self, node: ir.Node) -> None:
        self.node, self.number = node, 0
        assert node.graph is not None
        self.graph = node.graph

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        made = ir.node(op, list(inputs), attributes, domain=domain)
        self.number += 1
        made.name = f"{self.node.name or self.node.op_type}.{self.number}.{op}"
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def constant(self, value: Any) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(value)))

    def scalar(self, value: float) -> ir.Value:
        return self.constant(np.float32(value))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.asarray(values, np.int64))

    def float(self, x: ir.Value, known: bool = True) -> ir.Value:
        """``x`` in float32; ``known``: it may be that already."""
        return x if known and x.dtype == ir.DataType.FLOAT else self("Cast", x, to=ir.DataType.FLOAT.value)

    def finish(self, y: ir.Value, bias: ir.Value | None, x: ir.Value) -> None:
        """``y + bias``, in the dtype of ``x``, in the node's place."""
        y = y if bias is None else self("Add", y, self.float(bias))
        self._replace(
            y if x.dtype in (None, ir.DataType.FLOAT, ir.DataType.INT8) else self("Cast", y, to=x.dtype.value)
        )

    def finish_as(self, y: ir.Value) -> None:
        """``y`` in the dtype that the node asks for."""
        dtype = self.node.attributes["dtype"].as_int()
        self._replace(y if dtype == ir.DataType.FLOAT.value else self("Cast", y, to=dtype))

    def _replace(self, y: ir.Value) -> None:
        old = self.node.outputs[0]
        y.shape, y.dtype = old.shape, old.dtype
        name = old.name
        ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        y.name = name


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name
    return value.name


def _array(value: ir.Value) -> np.ndarray:
    """The numbers of an initializer.

    Raises:
        ExportError: it is computed, so there is nothing to store.
    """
    if value.const_value is None:
        raise ExportError(
            f"the packed weight {value.name} is computed in the graph, not stored; leave out the pass that computes it"
        )
    return value.const_value.numpy()


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _block_of(q: ir.Value) -> int:
    """The block size at which codes, filled up to whole blocks, and their scales take the fewest bytes."""
    width = _array(q).shape[1]
    return min(_BLOCKS, key=lambda b: -(-width // b) * (b + 8))


def _nibbles(codes: np.ndarray, group: int) -> np.ndarray:
    """One code a byte, (..., out, in), from the form of :class:`Int4`."""
    grouped = codes.reshape(*codes.shape[:-1], -1, group // 2)
    return np.concatenate([grouped & 15, grouped >> 4], -1).reshape(*codes.shape[:-1], -1)


def _blocks(rows: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    """Rows of bytes as (out, blocks, size), the last block filled up."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)), constant_values=fill).reshape(len(rows), -1, size)


def _packed(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low nibble; an odd last one stands alone."""
    even = np.pad(codes, (*[(0, 0)] * (codes.ndim - 1), (0, codes.shape[-1] % 2)))
    return (even[..., ::2] | (even[..., 1::2] << 4)).astype(np.uint8)


def _whole(points: np.ndarray) -> np.ndarray:
    """Zero points as the integers that the standard has for them."""
    whole = points.round()
    if (whole != points).any() or whole.min() < 0 or whole.max() > 15:
        raise ExportError(
            "zero points of an int4 weight are fractions, or no codes, for which ONNX has no operator: use a pass that keeps them whole "
            "(int4_weights, gptq, awq) in place of the one that packed it"
        )
    return whole.astype(np.uint8)


def _int4(codes: np.ndarray, symmetric: bool) -> np.ndarray:
    """Codes 0 to 15 as UINT4; with a zero point of 8 throughout, as INT4 around 0."""
    return (codes.astype(np.int8) - 8).astype(ml_dtypes.int4) if symmetric else codes.astype(ml_dtypes.uint4)
