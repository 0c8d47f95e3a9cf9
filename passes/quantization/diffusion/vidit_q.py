"""ViDiT-Q: diffusion transformers whose channels are balanced, then mixed, before weights and tokens are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.rows import IntPerToken, IntRows
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.bases.by_timestep import BalancedByTimestep
from accelpass.passes.quantization.bases.calibrated import InputMoments

KEPT = (
    "*x_embedder*", "*pos_embed*", "*patch_embed*", "*t_embedder*", "*t_block*", "*time_embed*", "*timestep_embed*", "*time_text_embed*",
    "*y_embedder*", "*class_embed*", "*caption_projection*", "*context_embedder*", "*final_layer*", "*proj_out*", "*proj_out_*",
    "*adaLN_modulation*", "*adaln_single*", "*norm*.linear", "*norm*.emb*",
)  # fmt: skip
"""What stays in floats: embeddings, modulation and the last layer, in the authors' names and in those of diffusers."""


@dataclass(frozen=True)
class ViDiTQ(BalancedByTimestep):
    """Multiply weights in a few bits with tokens rounded as they come, after channels were balanced and mixed.

    Ranges of an activation differ by token, guidance half, step and channel. A scale for each token, found as it comes, takes the
    first three. What channels differ by at all steps goes into the weight, ``m = max|w|^a / max|x|^(1 - a)``, and what is left, which
    differs from step to step, is spread over all channels by a rotation: ``(x m) R`` times ``((W / m) R)^T``. R is a Hadamard matrix
    with random signs, of the largest power of two that divides the width, once for each part of the width (inferred: the authors have
    further matrices for widths such as 1152). Linears that read one input share m (the authors fit one for each). Without calibration
    nothing is balanced or mixed, which is the paper's W8A8.

    With ``boundaries`` each range of timesteps has factors and a weight of its own: ``boundaries=(500,), momentum=0.95, rotate=False,
    strength=0.89`` is the paper's earlier variant, whose 0.11 is of the activation's magnitude (0.7 for its 0.3 of PixArt-Sigma).

    Attributes:
        bits: of weights, 4, 6 or 8, with a scale and a zero point for each output row; ``sites`` gives some weights other bits.
        activation_bits: of tokens, 4, 6 or 8.
        strength: a, of the weight's magnitude; 0.5665 is the authors' for Open-Sora.
        rotate: mix the channels.
        symmetric: no zero points; 8 bits then run in the kernels of ``int8_dynamic``.
        seed: of the signs.
        boundaries, momentum: of ranges of timesteps: the last of each but the highest, such as ``(500,)``, of the model's own timesteps,
            and the share that a channel's moving peak keeps at each call of the data (0: the largest of all). A range is a further
            packed weight.
        exclude: embeddings, modulation and the last layer by default.
    """

    exclude: tuple[str, ...] = KEPT
    bits: int = 8
    activation_bits: int = 8
    strength: float = 0.5665
    rotate: bool = True
    symmetric: bool = False
    seed: int = 0

    name: ClassVar[str] = "vidit_q"
    summary: ClassVar[str] = (
        "diffusion transformers in W8A8 to W4A8: channels balanced and mixed, tokens rounded as they come"
    )
    paper: ClassVar[str] = "Zhao et al. 2025, ViDiT-Q, arXiv 2406.02540, sections 3.2 and 3.3"

    def __post_init__(self) -> None:
        for field in ("bits", "activation_bits"):
            if getattr(self, field) not in (4, 6, 8):
                raise self.fail(field, "4, 6 or 8")
        if not 0 <= self.strength <= 1:
            raise self.fail("strength", "0 to 1")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        weight = Int8() if self.symmetric and self.bits == 8 else IntRows(self.bits, self.symmetric)
        return LinearSpec(weight, IntPerToken(self.activation_bits))

    @property
    def mixes(self) -> str:  # type: ignore[override]
        return "hadamard" if self.rotate else ""

    def mixed(self, channels: Tensor) -> Tensor:
        return rotated(channels) if self.rotate else channels

    def factors(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor:
        peaks = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(1e-5)
        m = peaks.pow(self.strength) / moments.peaks.clamp_min(1e-3).pow(1 - self.strength)
        draw = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, m.shape, generator=draw).to(m.device) * 2 - 1 if self.rotate else 1
        return signs / m


def rotated(x: Tensor) -> Tensor:
    """``x R`` over the last dimension, where R has a Hadamard matrix over the root of its size on its diagonal as often as it fits."""
    width = x.shape[-1]
    size = width & -width  # the largest power of two that divides it
    parts, half = x.unflatten(-1, (width // size, size)), 1
    while half < size:
        first, second = parts.unflatten(-1, (size // (2 * half), 2, half)).unbind(-2)
        parts = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    return parts.flatten(-2) / size**0.5
