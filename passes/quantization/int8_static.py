"""int8 weights and int8 activations whose ranges are known beforehand: rounding an input reads nothing but the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import ActivationFormat, LinearSpec
from accelpass.passes.core.base import Done, Skip
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.by_timestep import ByTimestep, RangeByTimestep
from accelpass.passes.quantization.bases.calibrated import InputMoments, InputRange, Learnt
from accelpass.passes.quantization.bases.weight_only import SharedWeight, WeightOnly, WithKernels
from accelpass.passes.quantization.int8_dynamic import Int8PerToken


@dataclass(frozen=True)
class Int8Static(ActivationFormat):
    """x = codes * step, symmetric, with one step for all rows, ``step`` float32 (out,); what is beyond -128..127 steps is clipped."""

    part: ClassVar[str] = "int8_static"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("step",)

    def encode(self, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        return in_steps(x, operands[0][:1], 127)


@dataclass(frozen=True)
class IntStatic(ActivationFormat):
    """:class:`Int8Static` with codes of fewer bits, from ``-2 ** (bits - 1)``."""

    part: ClassVar[str] = "int_static"
    bits: int = 4

    @property
    def operands(self) -> tuple[str, ...]:
        return ("step",)

    def encode(self, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        return in_steps(x, operands[0][:1], 2 ** (self.bits - 1) - 1)


def in_steps(x: Tensor, step: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes ``-most - 1`` to ``most`` of x in one step ``(1,)``, and the step for each row."""
    codes = (x / torch.where(step == 0, 1.0, step)).round().clamp(-most - 1, most)
    broken = codes.isnan().any(-1, keepdim=True)  # NaN has no code; it shows in its row, as it does without rounding
    return codes.nan_to_num(0.0).to(torch.int8), torch.where(broken, torch.nan, step.expand(*x.shape[:-1], 1))


@dataclass(frozen=True)
class Int8StaticPass(ByTimestep, WithKernels):
    """Multiply int8 weights with activations rounded to int8 by one range for each input, which calibration data tell.

    The range is the largest magnitude that the data have there: a larger one, later, is clipped. Nothing is searched in an input
    when it comes, which saves a pass over it and lets a chip round in the layer before; a token with outliers makes the steps of all
    coarse. A weight that no data reach has no range, and its inputs are rounded as ``int8_dynamic`` does. In ONNX an input is
    rounded by ``QuantizeLinear`` and ``DequantizeLinear``.

    A convolution multiplies what the codes of its input and of its kernel stand for, in floats; one that no data reach stays as it is.

    With ``boundaries`` each range of a denoiser's timesteps has a range of its own for each input (Q-Diffusion and ViDiT-Q choose
    parameters by step; that a static range is chosen so is inferred): a call costs the choice of one number, and the weight is packed once.

    Attributes:
        boundaries: the last timestep of each range but the highest, such as ``(500,)``, of the model's own timesteps.
        convolutions: round convolutions, too, their kernels as the matrices ``(out, in / groups * size)`` that they are.
    """

    name: ClassVar[str] = "int8_static"
    summary: ClassVar[str] = "int8 weights times activations rounded to int8 in ranges that data told"
    paper: ClassVar[str] = (
        "Jacob et al. 2018, arXiv 1712.05877, section 3.1 (ranges of activations); Nagel et al. 2021, arXiv 2106.08295, section 3"
    )

    by_range: ClassVar[str] = "range"
    most: ClassVar[int] = 127
    """The largest code of an input."""

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int8(), Int8Static())

    def moments(self, site: SharedWeight, program: Program) -> InputMoments:
        return RangeByTimestep(site, self.boundaries) if self.boundaries else InputRange(site)

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        if not isinstance(moments, RangeByTimestep):
            return [Learnt({"range": moments.peaks.amax().reshape(1)})] * len(weights)
        self.refuse_missing(moments.calls)
        return [Learnt({"range": moments.peaks, "boundaries": torch.tensor(self.boundaries)})] * len(weights)

    def rewrite(self, site: SharedWeight, edit: Edits) -> Done | Skip:
        if self.learnt(site, edit.program, "range") is None:
            if site.is_kernel:
                return Skip(
                    "no data told the range of this convolution's input; give a plan that accelpass.calibrate made"
                )
            return _AsItComes(form=self.spec.weight).rewrite(site, edit)
        return super().rewrite(site, edit)

    def known(self, site: SharedWeight, edit: Edits) -> list[fx.Node]:
        found = self.learnt(site, edit.program, "range")
        assert found is not None
        rows = int(shape(site.weight)[1 if site.transposed else 0])
        steps = (found.float() / self.most).unsqueeze(1).expand(-1, rows).contiguous()
        held = steps[0] if len(steps) == 1 else steps
        recipe = Recipe((self.name, "step", *held.shape, digest(held)), lambda w: placed(w, [held]))
        made = edit.derive([site.weight], recipe, [f"{site.weight.name}_step"])
        if held is not steps:
            return made
        operands, first = [*made, self.number(edit.program)], min(use.node for use in site.uses)
        return edit.run("chosen", lambda table, number: [table.index_select(0, number).squeeze(0)], operands, first)

    def whole(self, program: Program, sites: Sequence[SharedWeight]) -> str | None:
        said = super().whole(program, sites)
        return said and said.replace("every weight is rounded to the nearest", "every input is rounded as it comes")


@dataclass(frozen=True)
class _AsItComes(WeightOnly):
    """A weight whose input has no range."""

    form: Any = None
    name: ClassVar[str] = Int8StaticPass.name

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(self.form, Int8PerToken())
