"""Convolutions of channels that were joined: each part has a range and a packed weight of its own, for the product is a sum over parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.convolution import Convolution
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, is_call, shape, value
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.linear.op import INPUT, MATRIX
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Done, Skip
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.calibrated import InputRange
from accelpass.passes.quantization.bases.weight_only import SharedWeight


class RangesOfParts(InputRange):
    """The largest magnitude of each part of the channels, ``peaks`` ``(parts,)``."""

    def __init__(self, site: SharedWeight, widths: Sequence[int]) -> None:
        super().__init__(site)
        self.widths, self.peaks = list(widths), self.peaks.new_zeros(len(widths))

    def see(self, x: Tensor) -> None:
        found = torch.stack([part.detach().float().abs().amax() for part in x.split(self.widths, 1)])
        self.peaks = torch.maximum(self.peaks, found)
        self.rows += len(x)


def joined_parts(site: SharedWeight, spec: LinearSpec) -> list[fx.Node]:
    """What a 1x1 convolution's input was joined from along its channels; empty where it was not, or a part cannot be packed."""
    use = site.uses[0]
    if not isinstance(use, Convolution) or len(site.uses) > 1 or use.weight_operand() is not site.weight:
        return []
    joined, kernel = use.operand(), shape(site.weight)
    if not is_call(joined, aten.cat) or len(joined.args) < 2 or joined.args[1] not in (1, 1 - len(kernel)):
        return []
    parts = joined.args[0]
    assert isinstance(parts, Sequence)
    found = [part for part in parts if isinstance(part, fx.Node)]
    whole = sum(int(shape(part)[1]) for part in found) == use.in_features
    fits = not any(isinstance(spec.weight.check(int(shape(part)[1])), Skip) for part in found)
    return found if whole and fits and len(found) > 1 else []


def rewrite_parts(site: SharedWeight, spec: LinearSpec, parts: Sequence[fx.Node], steps: Tensor, edit: Edits) -> Done:
    """Let the convolution multiply what the codes of each part, in steps of its own ``(parts,)``, and of its columns stand for."""
    node, weight, text = site.uses[0].node, site.weight, spec.to_json()
    outputs, start = int(shape(weight)[0]), 0
    inputs, matrices, held = list[fx.Node](), list[fx.Node](), list[fx.Node]()
    for number, part in enumerate(parts):
        width, own = int(shape(part)[1]), steps[number].expand(outputs).contiguous()

        def packed(w: Tensor, start: int = start, width: int = width) -> tuple[Tensor, ...]:
            return spec.weight.pack(w.flatten(1)[:, start : start + width].contiguous())

        key = (*spec.weight.recipe(False, True).key, "columns", start, width)
        names = [f"{weight.name}_{operand}_{number}" for operand in spec.weight.operands]
        codes = edit.derive([weight], Recipe(key, packed), names)
        recipe = Recipe(("step", outputs, digest(own)), lambda w, own=own: placed(w, [own]))
        step = edit.derive([weight], recipe, [f"{weight.name}_step_{number}"])
        inputs.append(edit.call(node, INPUT, part, step, text))
        matrices.append(edit.call(node, MATRIX, codes, text, value(weight).dtype))
        held += codes
        start += width
    kernel = edit.call(
        node, aten.reshape.default, edit.call(node, aten.cat.default, matrices, 1), [*map(int, shape(weight))]
    )
    node.update_arg(0, edit.call(node, aten.cat.default, inputs, 1))
    node.update_arg(1, kernel)
    before, after = (sum(int(value(n).numel() * value(n).element_size()) for n in nodes) for nodes in ([weight], held))
    form = "x".join(str(int(s)) for s in shape(weight))
    return Done(f"{form} {spec.weight.part} in {len(parts)} parts, as its input was joined", before, after)
