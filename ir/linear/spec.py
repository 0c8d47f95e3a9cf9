"""What one linear computes: how its weight and its input are written, which slice of a stack it reads, what is added."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.parts import Part
from accelpass.ir.core.verdict import Take, Verdict

Packed = Sequence[Tensor]
"""The tensors of a packed weight, in the order of :meth:`WeightFormat.operands`."""


class Format(Part):
    """How a matrix, or the rows of an input, are written."""

    def shown(self) -> str:
        """``int4(group_size=64, symmetric=True)``."""
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.part}({given})" if given else self.part


class WeightFormat(Format):
    """How a weight W ``(..., out, in)`` is written; leading dimensions, such as experts, are allowed.

    The first dimension but the leading ones of every operand is the output rows, so that rows may be taken, cut and
    joined without knowing what an operand means.

    Class attributes:
        version: raise it when the packed form changes; a saved model of another version is not read.
    """

    version: ClassVar[int] = 1

    @property
    @abstractmethod
    def operands(self) -> tuple[str, ...]:
        """Names of the packed tensors. The first holds the codes."""

    @abstractmethod
    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        """The operands, from floats."""

    @abstractmethod
    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """W, or those of its rows that ``packed`` has, in ``dtype``; products are formed in float32."""

    @abstractmethod
    def width(self, packed: Packed) -> int:
        """How many input channels the rows have."""

    def multiply(self, x: Tensor, packed: Packed) -> Tensor:
        """``x W^T`` in float32; x is float32, or integers that an :class:`ActivationFormat` made."""
        return F.linear(x.float(), self.unpack(packed, torch.float32))

    def check(self, in_features: int) -> Verdict:
        """Whether the format can hold rows of this length."""
        return Take()

    def recipe(self, transposed: bool, kernel: bool = False) -> Recipe:
        """How to derive the operands of a weight.

        Args:
            transposed: it is stored as (in, out).
            kernel: it is a convolution's, ``(out, in / groups, *size)``: a row is all that one output is made with.
        """

        def pack(w: Tensor) -> tuple[Tensor, ...]:
            w = w.flatten(1) if kernel else w
            return self.pack(w.transpose(-1, -2).contiguous() if transposed else w)

        key = (self.part, self.version, *astuple(self), transposed)
        return Recipe((*key, "kernel") if kernel else key, pack)


class ActivationFormat(Format):
    """How the input ``(..., in)`` of a product is rounded before it.

    Operands, of a format that has some, are float32 ``(out,)`` as a weight's are, so that rows may be cut and joined; what is
    known of the input is the same number for each.
    """

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that it needs besides the input."""
        return ()

    @abstractmethod
    def encode(self, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of x's shape, and a float32 factor ``(..., 1)`` for each of its rows, from x in float32."""


class Selector(Part):
    """Which of several weights a linear reads."""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that it needs besides the weights."""
        return ()

    @abstractmethod
    def select(self, packed: Packed, *operands: Tensor) -> list[Tensor]:
        """The operands of the weight that is read."""


@dataclass(frozen=True)
class Expert(Selector):
    """One of a stack ``(experts, out, in)``."""

    part: ClassVar[str] = "expert"
    number: int

    def select(self, packed: Packed, *operands: Tensor) -> list[Tensor]:
        return [p[self.number] for p in packed]


@dataclass(frozen=True)
class Numbered(Selector):
    """One of a stack ``(sets, out, in)`` by a number that the graph computes: ``number`` int64 ``(1,)``, of a range of timesteps, say."""

    part: ClassVar[str] = "numbered"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("number",)

    def select(self, packed: Packed, *operands: Tensor) -> list[Tensor]:
        return [p.index_select(0, operands[0]).squeeze(0) for p in packed]


@dataclass(frozen=True)
class LinearSpec:
    """What one ``accelpass::linear`` computes: ``y = x W^T + bias``, and ``(x A^T) B^T`` where it has a residual.

    Attributes:
        weight: how W is written.
        activation: how x is rounded before the product with W; None for as it is.
        by: which weight is read, where the weight's operands hold several.
        low_rank: the rank of a residual branch: A ``(rank, in)`` and B ``(out, rank)`` come after W's operands, and x is
            not rounded for them.

    An op's operands are the weight's, the activation's, the residual's, and what the choice of a weight needs.
    """

    weight: WeightFormat
    activation: ActivationFormat | None = None
    by: Selector | None = None
    low_rank: int = 0

    def of_weight(self, operands: Sequence[Any]) -> list[Any]:
        """Those of an op's operands, tensors or nodes, that hold W."""
        return list(operands[: len(self.weight.operands)])

    def of_activation(self, operands: Sequence[Any]) -> list[Any]:
        """What the rounding of x needs."""
        before, count = len(self.weight.operands), 0 if self.activation is None else len(self.activation.operands)
        return list(operands[before : before + count])

    def of_residual(self, operands: Sequence[Any]) -> list[Any]:
        """A and B, or nothing."""
        before = len(self.weight.operands) + (0 if self.activation is None else len(self.activation.operands))
        return list(operands[before : before + 2]) if self.low_rank else []

    def of_choice(self, operands: Sequence[Any]) -> list[Any]:
        """What :attr:`by` needs besides the weights."""
        count = 0 if self.by is None else len(self.by.operands)
        return list(operands[len(operands) - count :])

    def shown(self) -> str:
        """``int8 x int8_per_token, expert(number=3), rank 16``."""
        weight = (
            self.weight.shown() if self.activation is None else f"{self.weight.shown()} x {self.activation.shown()}"
        )
        by = None if self.by is None else f"{self.by.part}({', '.join(map(str, astuple(self.by)))})"
        return ", ".join(filter(None, (weight, by, f"rank {self.low_rank}" if self.low_rank else None)))

    def to_json(self) -> str:
        data: dict[str, Any] = {"weight": self.weight.to_json()}
        data |= {name: part.to_json() for name in ("activation", "by") if (part := getattr(self, name)) is not None}
        return json.dumps(data | ({"low_rank": self.low_rank} if self.low_rank else {}), sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_json(text: str) -> LinearSpec:
        return LinearSpec(**{k: Part.from_json(v) if isinstance(v, dict) else v for k, v in json.loads(text).items()})
