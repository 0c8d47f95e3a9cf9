"""GemFilter: the last token's queries in an early layer choose the tokens that the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.transform.sequence.prompt import NoPrompt, Prompt
from accelpass.passes.token_pruning.filter import PromptFilter

_SHARE = 13 / 32


@dataclass(frozen=True)
class GemFilter(PromptFilter):
    """A prompt runs through the first layers, which choose ``keep`` tokens; the model reads these as if they were the prompt.

    Shi et al., "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction", arXiv
    2409.17422. A token's score is the product of its key with the last token's queries in layer ``layer``, after the rotary
    embedding, without scale or softmax, summed over heads and averaged over neighbours. The chosen tokens keep their order
    and get the positions 0, 1, 2 ...; nothing is kept of the others. Later turns are appended in full (inferred: the paper
    would filter the whole text anew). Of padding nothing is chosen while there are other tokens, and it counts as the zeros
    beyond the text's ends do, so that a sequence of a batch is filtered as it would be alone.

    Attributes:
        layer: number of the attention whose queries choose; None for 13 of 32, the paper's for Llama 3.1, scaled to the
            model's depth (inferred; the paper took 19 of 40 and 19 of 32 for other models).
        keep: how many tokens are chosen.
        pool: how many neighbours a score is averaged over; odd.
        force_first, force_last: how many tokens of either end are chosen whatever their score (not in the paper's code,
            which may drop even the first and the last).
    """

    layer: int | None = None
    pool: int = 5
    force_first: int = 0
    force_last: int = 0

    name: ClassVar[str] = "gemfilter"
    summary: ClassVar[str] = "an early layer chooses the tokens of a long prompt that the model reads"
    paper: ClassVar[str] = "arXiv:2409.17422"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1 << 20}

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise self.fail("keep", "a number of tokens, at least 1")
        if self.layer is not None and self.layer < 0:
            raise self.fail("layer", "the number of a layer, from 0, or None")
        if self.pool < 1 or self.pool % 2 == 0:
            raise self.fail("pool", "an odd number")
        for end in ("force_first", "force_last"):
            if getattr(self, end) < 0:
                raise self.fail(end, "a number of tokens, 0 for none")
        if self.force_first + self.force_last > self.keep:
            raise self.fail("force_first", f"at most keep={self.keep} tokens, with force_last")

    def layer_of(self, found: Prompt) -> int:
        depth, layer = len(found.attentions), self.layer
        if layer is None:
            wanted = min(depth - 1, round(_SHARE * depth))
            whole = [i for i, window in enumerate(found.windows) if not window]
            layer = min(whole, key=lambda i: abs(i - wanted), default=wanted)
        if layer >= depth:
            raise NoPrompt(f"layer={layer}: the model has {depth} attentions, the last is number {depth - 1}")
        if found.windows[layer]:
            raise NoPrompt(
                f"layer={layer} sees its last {found.windows[layer]} tokens alone; choose one that sees the whole prompt"
            )
        return layer

    def choose(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        # The sum over the heads that share a key is that of their queries' products with it.
        shared = q.float().unflatten(1, (k.shape[1], -1)).sum(2)
        scores = torch.matmul(k.float(), shared.unsqueeze(-1)).squeeze(-1).sum(1)
        scores = F.avg_pool1d(scores.masked_fill(~seen, 0).unsqueeze(1), self.pool, 1, self.pool // 2).squeeze(1)
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.force_first:
            scores = scores.masked_fill(seen & (seen.long().cumsum(1) <= self.force_first), float("inf"))
        if self.force_last:
            behind = seen.long().flip(1).cumsum(1).flip(1)
            scores = scores.masked_fill(seen & (behind <= self.force_last), float("inf"))
        return scores.topk(self.keep, -1).indices.sort(-1).values
