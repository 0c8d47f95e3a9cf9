"""Weights that somebody else has rounded: the codes of a checkpoint take the place of the floats that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.linear import Linear
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Done, Skip, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.stored_codes import codes_of
from accelpass.passes.quantization.bases.weight_only import SharedWeight, WeightOnly


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight of a checkpoint.

    Attributes:
        spec: how its rows are written, and how inputs are rounded if they are.
        packed: the operands of the weight's format, of all rows.
        known: those of the input's rounding.
        order: which input channel each stored column is of ``(in,)``; None where they are in order.
    """

    spec: LinearSpec
    packed: tuple[Tensor, ...]
    order: Tensor | None = None
    known: tuple[Tensor, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.packed[0].shape[0], self.spec.weight.width(self.packed)

    def values(self) -> Tensor:
        """W ``(out, in)`` in float32."""
        made = self.spec.weight.unpack(self.packed, torch.float32)
        return made if self.order is None else made[:, self.order.argsort()]

    def rows(self, index: Tensor) -> Stored:
        """Some of its rows, by number."""
        return replace(self, packed=tuple(p[index] for p in self.packed))

    def artefacts(self, path: str) -> dict[str, Tensor]:
        """What a plan holds of the weight of a path. Tensors are all that it has, so the spec is spelled in bytes."""
        kept = dict(zip(self.spec.weight.operands, self.packed, strict=True))
        kept["spec"] = torch.tensor(list(self.spec.to_json().encode()), dtype=torch.uint8)
        kept |= {} if self.order is None else {"order": self.order}
        if self.spec.activation is not None:
            kept |= dict(zip(self.spec.activation.operands, self.known, strict=True))
        return {f"{Prequantized.name}/{path}/{part}": t.contiguous() for part, t in kept.items()}


@dataclass(frozen=True)
class Prequantized(WeightOnly):
    """Compute with the codes of a checkpoint as they are: nothing is rounded a second time.

    ``accelpass.load_quantized`` makes the plan that this pass reads. A weight that the checkpoint has in floats is left alone. A
    weight that is not the one that the codes stand for is refused, if the plan has its ``probe``.
    """

    name: ClassVar[str] = "prequantized"
    summary: ClassVar[str] = "the codes of a GPTQ, AWQ, compressed-tensors or GGUF checkpoint, as they are"

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int8())

    def whole(self, program: Program, sites: Sequence[SharedWeight]) -> str | None:
        if not any(name.startswith(f"{self.name}/") for name in program.artefacts):
            return "there is no checkpoint: accelpass.load_quantized(model, path) reads one"
        return super().whole(program, sites)

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        held = self._held(site, program)
        if held is None:
            return Skip("the checkpoint has no codes for it")
        if held.order is not None and not all(isinstance(use, Linear) for use in site.uses):
            return Skip("the checkpoint has its columns in another order, which only a linear can read")
        seen, here = (
            held.size,
            tuple(int(n) for n in (shape(site.weight)[::-1] if site.transposed else shape(site.weight))),
        )
        if seen != here:
            return Skip(
                f"the checkpoint's codes are of a weight of {seen}, and it is {here} here: another pass has cut it"
            )
        return _One(held=held).check(site, program)

    def rewrite(self, site: SharedWeight, edit: Edits) -> Done | Skip:
        return _One(held=self._held(site, edit.program)).rewrite(site, edit)

    def _held(self, site: SharedWeight, program: Program) -> Stored | None:
        prefix, held = f"{self.name}/{program.tensors.path(site.weight)}/", program.artefacts
        spelled = held.get(f"{prefix}spec")
        if spelled is None:
            return None
        spec = LinearSpec.from_json(bytes(spelled.tolist()).decode())
        packed = tuple(held[prefix + operand] for operand in spec.weight.operands)
        needed = () if spec.activation is None else spec.activation.operands
        return Stored(spec, packed, held.get(f"{prefix}order"), tuple(held[prefix + operand] for operand in needed))


@dataclass(frozen=True)
class _One(WeightOnly):
    """One weight of a checkpoint."""

    held: Any = None
    name: ClassVar[str] = Prequantized.name

    @property
    def spec(self) -> LinearSpec:
        return self.held.spec

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        packed, where = self.held.packed, f"{self.name}/{edit.program.tensors.path(site.weight)}"
        again = (
            f"{self.name}: {site.path} is not the weight that the checkpoint has (it was trained, merged or loaded since); run "
            "accelpass.load_quantized again"
        )
        known = edit.program.artefacts.get(f"{where}/probe")
        key = (*super().recipe(site, edit).key, self.name, *map(digest, packed))
        return Recipe(key, codes_of(packed, known, site.transposed, again))

    def known(self, site: SharedWeight, edit: Edits) -> list[fx.Node]:
        held, activation = self.held.known, self.spec.activation
        if activation is None or not held:
            return []
        recipe = Recipe((self.name, "known", *map(digest, held)), lambda w: placed(w, held))
        return edit.derive([site.weight], recipe, [f"{site.weight.name}_{n}" for n in activation.operands])

    def entering(self, site: SharedWeight, use: Linear, edit: Edits) -> fx.Node:
        x, order = use.operand(), self.held.order
        if order is None:
            return x
        recipe = Recipe((self.name, "order", digest(order)), lambda w: placed(w, [order]))
        (columns,) = edit.derive([site.weight], recipe, [f"{site.weight.name}_order"])
        return edit.call(use.node, aten.index_select.default, x, -1, columns)
