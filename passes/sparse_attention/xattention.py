"""XAttention: antidiagonals of the scores tell which blocks of a prompt's attention matter (arXiv 2503.16428)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention
from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.passes.core.base import Skip, Study
from accelpass.passes.sparse_attention.head_plan import HeadPlan, most_within
from accelpass.passes.sparse_attention.patterns.antidiagonals import Antidiagonals

_STEP, _STEPS = 0.9, 10
"""A step of the search takes a tenth off a head's threshold (the paper); so many at most (inferred)."""


@dataclass(frozen=True)
class XAttention(HeadPlan):
    """Each block of queries reads the blocks of keys in which sums over antidiagonals of the scores are largest.

    Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", section 2. In each tile of ``stride x stride`` scores
    one antidiagonal is summed, which every row and every column of the tile has a part in; a softmax of these sums, added up over
    blocks, estimates the attention, and the fewest blocks are read whose share reaches ``threshold``. A block's own keys and the
    first block are always read, and count (the authors' code). The estimate costs one ``stride``-th of the scores, and holds
    ``(tokens / stride) ** 2`` float32 numbers a head. Keys are cached in their order; decoding stays dense.

    Calibration (section 2.3): a threshold for each head, from ``threshold`` down in steps of a tenth of itself. What a step costs is
    measured for each head, as the error of its output (inferred: the paper does not say how all heads' choices are told apart);
    dynamic programming finds, for each number of steps in all, the heads that take them. The plan is the most steps with
    which perplexity on the held-back batches is at most ``loss`` above the dense model's (inferred).

    Attributes:
        block: tokens of a block.
        stride: tokens of a side of a tile; 8 and 16 are the paper's.
        threshold: the share of the estimated softmax that the chosen blocks reach; 1 reads all. Of all heads without a plan.
        loss: share of perplexity that calibration gives up.

    Raises:
        OptionError: a number out of range, or a block that is not whole tiles.
        PlanError: when compiled, a plan for other heads.
    """

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "prompts read the blocks of keys in which antidiagonals of the scores are large"
    paper: ClassVar[str] = "XAttention, arXiv 2503.16428"
    identity: ClassVar[dict[str, Any] | None] = {"threshold": 1.0}
    planned: ClassVar[str] = "thresholds"
    width: ClassVar[int] = 1
    block: int = 128
    stride: int = 8
    threshold: float = 0.9
    loss: float = 0.01

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise self.fail("stride", "1 token or more; 8 and 16 are the paper's")
        if self.block < self.stride or self.block % self.stride:
            raise self.fail("block", f"a multiple of stride={self.stride}")
        if not 0 < self.threshold <= 1:
            raise self.fail("threshold", "a share above 0, up to 1, which reads all")
        if not 0 <= self.loss < float("inf"):
            raise self.fail("loss", "a share of perplexity, 0 or more")
        self.check_sites()

    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        if isinstance(tokens, int) and tokens <= 2 * self.block:
            return Skip(f"its {tokens} tokens are two blocks of {self.block} at most, which are always read")
        select = Antidiagonals(self.block, self.stride, self.threshold)
        return select, f"blocks of {self.block} keys up to {self.threshold:.0%} of the estimated attention"

    def of_heads(self, rows: Tensor) -> tuple[BlockSelect, str]:
        each = tuple(rows.flatten().tolist())
        said = f"blocks of {self.block} keys up to {min(each):.0%} to {max(each):.0%} of the estimated attention of each head"
        return Antidiagonals(self.block, self.stride, each), said

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """See the class. Beside the thresholds: ``xattention/perplexity``."""
        ladder = torch.tensor([self.threshold * _STEP**n for n in range(_STEPS + 1)], dtype=torch.float64)
        tried = self.tried(study, [Antidiagonals(self.block, self.stride, t) for t in ladder.tolist()], "thresholds")
        sites = sorted(tried.errors)
        costs = torch.cat([tried.errors[site] / tried.calls[site] for site in sites])
        taken = fewest_errors(costs - costs[:, :1])
        heads = [len(tried.errors[site]) for site in sites]

        def rows(steps: int) -> dict[str, Tensor]:
            each = ladder[taken(steps)].unsqueeze(1).split(heads)
            return dict(zip(sites, each, strict=True))

        before, found = self.perplexity(study, None, "the dense model"), dict[int, float]()

        def is_within(steps: int) -> bool:
            found[steps] = self.perplexity(study, rows(steps), f"{steps} steps")
            return found[steps] <= (1 + self.loss) * before

        best = most_within(len(costs) * _STEPS, is_within)
        after = found[best] if best in found else self.perplexity(study, rows(best), f"{best} steps")
        return self.made(rows(best), before, after)


def fewest_errors(costs: Tensor) -> Callable[[int], Tensor]:
    """For each number of steps in all, how many each head takes, so that the sum of what they cost is least.

    Args:
        costs: of 0, 1, ... steps of each head, ``(heads, steps + 1)``.

    Returns:
        A function from the number to int64 ``(heads,)``.
    """
    heads, most = costs.shape[0], costs.shape[1] - 1
    best = torch.full((heads * most + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    choice = torch.zeros(heads, len(best), dtype=torch.int64)
    for head in range(heads):
        after = torch.full_like(best, torch.inf).repeat(most + 1, 1)
        for own in range(most + 1):
            after[own, own:] = best[: len(best) - own] + costs[head, own]
        best, choice[head] = after.min(0)

    def taken(steps: int) -> Tensor:
        made = torch.zeros(heads, dtype=torch.int64)
        for head in reversed(range(heads)):
            made[head] = choice[head, steps]
            steps -= int(made[head])
        return made

    return taken
