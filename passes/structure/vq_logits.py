"""An output head of few vectors: tokens of one code share a logit (VQ-Logits, arXiv 2505.10202)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.analyses.structure.output_head import OutputHead, output_heads
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, value
from accelpass.ir.core.program import Program
from accelpass.ir.torch_private import FakeTensor
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

FORMAT = 1
_ROWS = 4096
"""Rows of the head that are compared with all codes at a time."""


@dataclass(frozen=True)
class VqLogits(SitePass):
    """Replace the rows of the output head by a codebook; a token's logit is that of its code.

    After "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits": ``K`` logits are
    computed with a codebook ``(K, width)`` and spread to the vocabulary by a fixed map. Codes are the centres of a k-means of the
    head's rows (the paper's pre-assigned form), and follow the weight when it is swapped. Tokens of one code have equal logits, of
    which a greedy choice takes the lowest id. A bias of the head stays a token's own (inferred). The paper trains the codebook
    afterwards; without that the model answers worse, much worse at few codes.

    Attributes:
        codes: vectors of the codebook. As many as there are tokens, or more, leave the head as it is.
        iterations: of the k-means.
        seed: of its first centres, which are rows of the head.
    """

    codes: int = 4096
    iterations: int = 25
    seed: int = 0

    name: ClassVar[str] = "vq_logits"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "tokens of one code share a logit: the output head is a small codebook"
    paper: ClassVar[str] = "VQ-Logits, arXiv 2505.10202"
    identity: ClassVar[dict[str, Any] | None] = {"codes": 2**30}
    edits: ClassVar[frozenset[str]] = frozenset({"head.rows"})
    nothing: ClassVar[str] = "the graph returns no logits of an output head"

    def __post_init__(self) -> None:
        for name, least in (("codes", 1), ("iterations", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise self.fail(name, f"a number from {least}")
        super().__post_init__()

    def find(self, program: Program) -> list[OutputHead]:
        found: list[OutputHead] = program.analysis(output_heads)
        return found

    def check(self, site: OutputHead, program: Program) -> Verdict:
        if self.codes >= site.size:
            return Skip(f"each of {site.size} tokens has a code of its own")
        if site.linear.kind.endswith("conv"):
            return Skip(f"the head is a {site.linear.kind}")
        return Take()

    def rewrite(self, site: OutputHead, edit: Edits) -> Done:
        head = site.linear
        key = ("vq_logits", FORMAT, self.codes, self.iterations, self.seed, head.transposed)
        recipe = Recipe(key, self._made(head.transposed), first=True)
        codebook, codes = edit.derive([head.weight], recipe, [f"{head.weight.name}_{n}" for n in ("codebook", "codes")])
        few = edit.call(head.node, aten.linear.default, head.operand(), codebook)
        logits = edit.call(head.node, aten.index_select.default, few, -1, codes)
        if head.bias is not None:
            logits = edit.call(head.node, aten.add.Tensor, logits, head.bias)
        edit.replace(head.node, logits)
        sizes = (value(n).numel() * value(n).element_size() for n in (head.weight, codebook, codes))
        before, *after = map(int, sizes)
        return Done(f"{self.codes} codes for {site.size} tokens", before, sum(after))

    def _made(self, transposed: bool) -> Any:
        def made(weight: Tensor) -> tuple[Tensor, Tensor]:
            rows = weight.t() if transposed else weight
            if isinstance(weight, FakeTensor):
                return rows.new_empty((self.codes, rows.shape[1])), rows.new_empty(len(rows), dtype=torch.long)
            centres, codes = clustered(rows.float(), self.codes, self.iterations, self.seed)
            return centres.to(weight.dtype), codes

        return made


def clustered(rows: Tensor, count: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres ``(count, width)`` of a k-means of ``rows``, and the centre that each row is nearest to; of equal ones the first.

    A centre that no row is nearest to stays where it was.
    """
    draw = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=draw)[:count].to(rows.device)].clone()
    for _ in range(iterations):
        codes = _nearest(rows, centres)
        size = torch.bincount(codes, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, codes, rows) / size.clamp_min(1)
        centres = torch.where(size > 0, means, centres)
    return centres, _nearest(rows, centres)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, centres).argmin(1) for part in rows.split(_ROWS)])
