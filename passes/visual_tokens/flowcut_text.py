"""FlowCut's second stage: visual tokens leave a language model by what flows from them to the last token (arXiv 2505.19536)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import inserted
from accelpass.passes.visual_tokens.inside import VisualShare, by_token, visual_places


@dataclass(frozen=True)
class FlowCutText(VisualShare):
    """Behind layer ``layer`` the visual tokens go on from which most has flowed to the last token there.

    Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", NeurIPS 2025: the stage
    that its code runs in a layer of the language model for images in tiles (LLaVA-NeXT) and for Qwen2-VL. Among the visual tokens alone
    the last token's attention is shared out, and how like its value is to theirs; a token scores the sum of its two shares, each the mean
    over heads, times the sum of the magnitudes of its value, the mean over heads. In a batch each text has its own choice.

    Tokens keep their positions, where the released code counts those that are left anew (inferred: both tell the same order). Its first stage,
    inside the tower, is another pass; this one may be used where the tower stands in a graph of its own.

    Attributes:
        layer: how many layers read all tokens; the released code prunes behind the layer of index 1.
        keep: share of visual tokens that goes on; 0.4 are the authors' T of 5 T / 2 tokens of five tiles.
    """

    layer: int = 2
    keep: float = 0.4

    name: ClassVar[str] = "flowcut_text"
    summary: ClassVar[str] = (
        "behind its first layers a language model reads the visual tokens that flow to the last token"
    )
    paper: ClassVar[str] = "FlowCut, arXiv 2505.19536"

    def score(self, program: Program, attention: fx.Node, before: fx.Node) -> fx.Node:
        q, k, v = attention.args[:3]
        mask, each = visual_places(program, value(q).shape[0])
        run = partial(_flow, spec_of(attention).scale, each)
        return inserted(program, before, run, mask, q, k, v)[0]


def _flow(scale: float, each: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What each token is worth, float32 ``(texts, tokens)``; of those of the text, nothing is said.

    Args:
        q: ``(texts, heads, tokens, d)``; k, v: ``(texts, kv_heads, tokens, d)``; the last token sees all.
    """
    hidden = by_token(mask, each).logical_not()[:, None, None]
    k, values = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float(), v.float()
    paid = torch.matmul(q[:, :, -1:].float(), k.mT) * scale
    alike = torch.matmul(values[:, :, -1:], values.mT) * values.shape[-1] ** -0.5
    shares = (s.masked_fill(hidden, float("-inf")).softmax(-1)[:, :, 0].mean(1) for s in (paid, alike))
    return [sum(shares) * values.mean(1).abs().sum(-1)]
