"""MixDQ: few-step text-to-image models in static W8A8, with the first token of the text computed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.linear import Linear
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.errors import PlanError
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.rows import IntRows
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Done, Skip
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.calibrated import InputMoments, InputRange, Learnt
from accelpass.passes.quantization.bases.parted import RangesOfParts, joined_parts, rewrite_parts
from accelpass.passes.quantization.bases.weight_only import SharedWeight
from accelpass.passes.quantization.int8_static import Int8Static, Int8StaticPass, IntStatic


class TextRange(InputRange):
    """Of text that cross-attention reads ``(batch, tokens, in)``.

    Attributes:
        first: the first token, if it was the same in all data; None if not.
        rest: the largest magnitude of the other tokens.
        prompts: whether the other tokens were not always the same, so that the data say something of the first.
    """

    def __init__(self, site: SharedWeight) -> None:
        super().__init__(site)
        self.first: Tensor | None = None
        self.rest, self.prompts = torch.zeros(()), False
        self._other: Tensor | None = None
        self._same = True

    def see(self, x: Tensor) -> None:
        super().see(x)
        if x.dim() != 3 or x.shape[1] < 2:
            self.first, self._same = None, False
            return
        first, others = x[:, 0].float(), x[:, 1:].float()
        known = first[0] if self.first is None else self.first
        other = others[0] if self._other is None else self._other
        self._same = self._same and bool(torch.isclose(first, known, rtol=1e-4, atol=1e-6).all())
        self.first = known.clone() if self._same else None
        self.prompts |= other.shape != others[0].shape or bool((others != other).any())
        self._other, self.rest = other, torch.maximum(self.rest, others.abs().amax())


@dataclass(frozen=True)
class MixDQ(Int8StaticPass):
    """Multiply weights in a few bits with int8 activations of known ranges; the text's first token is left out of keys and values.

    The first token of a causal text encoder (BOS) is the same for every prompt, and many times larger than all others. What a
    cross-attention's key and value linears make of it is a constant, computed in floats; only the other tokens are rounded, in a range
    of their own. That holds only where the first token is the same in all prompts: it is checked on the data, which need two prompts
    that differ, and where it does not hold (T5, a bidirectional encoder) the linear is rounded as any other. A plan is for that encoder.

    A 1x1 convolution whose input was joined along channels (the short cut of a block that reads a skip connection) has a range and scales
    for each part.

    Weights have one symmetric scale for each output row. Activations are symmetric, too (the authors' have a zero point).
    Which weights get how many bits is what ``accelpass.search_bits`` finds, by sensitivity split by metric; ``sites`` takes it.

    Attributes:
        bits: of weights, 2, 4 or 8.
        activation_bits: of inputs, 4 or 8.
        boundaries: ranges of timesteps with ranges of inputs of their own; texts and joined inputs have one for all.
        bos: compute the first token beforehand.
        convolutions: round convolutions, too, their kernels as the matrices ``(out, in / groups * size)`` that they are; in few steps the
            first and the last one are the most sensitive (``exclude=["conv_in", "conv_out"]``).
    """

    bits: int = 8
    activation_bits: int = 8
    bos: bool = True
    convolutions: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "mixdq"
    summary: ClassVar[str] = "static W8A8 to W4A8 for text-to-image models, the text's first token computed beforehand"
    paper: ClassVar[str] = "Zhao et al. 2024, MixDQ, arXiv 2405.17873, sections 3.1 to 3.3"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise self.fail("bits", "2, 4 or 8")
        if self.activation_bits not in (4, 8):
            raise self.fail("activation_bits", "4 or 8")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        weight = Int8() if self.bits == 8 else IntRows(self.bits, symmetric=True)
        return LinearSpec(weight, Int8Static() if self.activation_bits == 8 else IntStatic(self.activation_bits))

    @property
    def most(self) -> int:  # type: ignore[override]
        return 2 ** (self.activation_bits - 1) - 1

    def has_ranges(self, site: SharedWeight, program: Program) -> bool:
        return not self._is_text(site, program) and not joined_parts(site, self.spec)

    def _is_text(self, site: SharedWeight, program: Program) -> bool:
        """Whether its input is the text that cross-attention reads, whose first token is left out."""
        crossing = [a for a in program.analysis(detect) if a.kind == "cross"]
        return self.bos and site.uses[0].node in {n for a in crossing for n in (*a.k_proj, *a.v_proj)}

    def moments(self, site: SharedWeight, program: Program) -> InputMoments:
        if parts := joined_parts(site, self.spec):
            return RangesOfParts(site, [int(shape(part)[1]) for part in parts])
        return TextRange(site) if self._is_text(site, program) else super().moments(site, program)

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        if isinstance(moments, RangesOfParts):
            return [Learnt({"range": moments.peaks})] * len(weights)
        if isinstance(moments, TextRange) and moments.first is not None and moments.prompts:
            return [Learnt({"range": moments.rest.reshape(1), "bos": moments.first})] * len(weights)
        return super().learn(weights, moments)

    def rewrite(self, site: SharedWeight, edit: Edits) -> Done | Skip:
        ranges = self.learnt(site, edit.program, "range")
        by_timestep = self.learnt(site, edit.program, "boundaries") is not None
        if ranges is None or len(ranges) == 1 or by_timestep:
            return super().rewrite(site, edit)
        parts = joined_parts(site, self.spec)
        if len(parts) != len(ranges):
            raise PlanError(
                f"{self.name}: the plan has ranges for {len(ranges)} parts of the input of {site.path}, which has {len(parts)}; calibrate "
                "with the options that you use"
            )
        return rewrite_parts(site, self.spec, parts, ranges.float() / self.most, edit)

    def entering(self, site: SharedWeight, use: Linear, edit: Edits) -> fx.Node:
        x = super().entering(site, use, edit)
        if self.learnt(site, edit.program, "bos") is None:
            return x
        return edit.call(use.node, aten.slice.Tensor, x, 1, 1, 2**63 - 1)

    def leaving(self, site: SharedWeight, use: Linear, product: fx.Node, edit: Edits) -> fx.Node:
        first = self.learnt(site, edit.program, "bos")
        if first is None:
            return product

        def projected(w: Tensor) -> tuple[Tensor, ...]:
            (token,) = placed(w, [first])
            matrix = w.t() if site.transposed else w
            return ((matrix.float() @ token.float()).to(w.dtype).reshape(1, 1, -1),)

        recipe = Recipe((self.name, "bos", site.transposed, digest(first)), projected)
        (constant,) = edit.derive([site.weight], recipe, [f"{site.weight.name}_bos"])
        if use.bias is not None:
            constant = edit.call(use.node, aten.add.Tensor, constant, use.bias)

        def joined(rest: Tensor, constant: Tensor) -> list[Tensor]:
            return [torch.cat([constant.to(rest.dtype).expand(rest.shape[0], 1, -1), rest], 1)]

        return edit.run("bos", joined, [product, constant], use.node)[0]
