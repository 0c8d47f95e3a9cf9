"""Attention over parameter tokens, computed a block of them at a time (TokenFormer, arXiv 2410.23168)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.analyses.axes.flow import between
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.pattention import Pattention, pattentions
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass


@dataclass(frozen=True)
class PattentionPass(SitePass):
    """Never hold the scores of all parameter tokens: each block's are computed, turned into weights, and multiplied with its values.

    After Wang et al., "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters", equation 4: every projection is
    ``GeLU(x K^T * tau / ||x K^T||) V``. The norm of a row is needed before the first block; it is ``sqrt(x (K^T K) x^T)``, with ``K^T K``
    kept beside the weights, so that no score is computed twice (the card's algebra, inferred). The authors' other two norms
    (``gelu_l2_norm``, ``softmax``) divide the sum at the end. It takes less memory, ``tokens * block`` in place of ``tokens * parameter
    tokens``, and as many products; it makes no call faster by itself. :func:`accelpass.grow_pattention` appends parameter tokens.

    Attributes:
        block: parameter tokens at a time.
    """

    block: int = 1024

    name: ClassVar[str] = "pattention"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "attention over parameter tokens, a block of them at a time"
    paper: ClassVar[str] = "TokenFormer, arXiv 2410.23168"
    exact: ClassVar[bool] = True
    edits: ClassVar[frozenset[str]] = frozenset({"linear.kernel"})
    nothing: ClassVar[str] = "no attention over parameter tokens was found: x K^T, its norm, a non-linear function, V"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise self.fail("block", "a number of parameter tokens, at least 1")
        super().__post_init__()

    def find(self, program: Program) -> list[Pattention]:
        return list(program.analysis(pattentions))

    def check(self, site: Pattention, program: Program) -> Verdict:
        if site.tokens <= self.block:
            return Skip(f"its {site.tokens} parameter tokens are one block (block={self.block})")
        if value(site.keys.weight).dtype != value(site.keys.operand()).dtype:
            return Skip("its parameters have another dtype than what they are multiplied with")
        return Take()

    def rewrite(self, site: Pattention, edit: Edits) -> Done:
        node, operands = site.values.node, [site.keys.operand(), site.keys.weight, site.values.weight]
        if site.norm == "l2_norm_gelu":
            recipe = Recipe(
                ("pattention.gram", 1, site.keys.transposed), partial(_gram, transposed=site.keys.transposed)
            )
            operands += edit.derive([site.keys.weight], recipe, [f"{site.keys.weight.name}_gram"])
        turned = (site.keys.transposed, not site.values.transposed)
        kind = (site.norm, site.before, site.scale, site.outer, site.approximate, self.block, *turned)
        run = partial(streamed, site=_Plain.of(site), turned=turned, block=self.block)
        (made,) = edit.run(kind, lambda *given: [run(*given)], operands, node)
        former = [site.keys.node, *between(edit.program, site.keys.node, node)][:-1]
        edit.replace(node, made)
        for dead in reversed(former):  # what was written in place would stay otherwise
            if not dead.users:
                edit.program.graph.erase_node(dead)
        blocks = -(-site.tokens // self.block)
        return Done(f"{site.tokens} parameter tokens in {blocks} blocks")


@dataclass(frozen=True)
class _Plain:
    """What of a site is numbers."""

    norm: str
    before: float
    scale: float
    outer: float
    approximate: str

    @classmethod
    def of(cls, site: Pattention) -> _Plain:
        return cls(site.norm, site.before, site.scale, site.outer, site.approximate)


def streamed(
    x: Tensor, keys: Tensor, values: Tensor, *gram: Tensor, site: Any, turned: Sequence[bool], block: int
) -> Tensor:
    """``x (..., in)``, keys ``(n, in)`` and values ``(n, out)``, or the transposed of these where ``turned`` says so."""
    keys, values = (w.t() if turn else w for w, turn in zip((keys, values), turned, strict=True))
    made: Tensor | None = None
    total: Tensor | None = None
    if gram:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide @ gram[0], dim=-1, keepdim=True)
    for start in range(0, keys.shape[0], block):
        scores = F.linear(x, keys[start : start + block])
        if gram:
            weights = F.gelu((scores.float() * (site.scale / norm)).to(x.dtype), approximate=site.approximate)
        elif site.norm == "gelu_l2_norm":
            weights = F.gelu(scores * site.before, approximate=site.approximate)
            part = weights.float().square().sum(-1, keepdim=True)
        else:
            weights = torch.exp(scores * site.before)
            part = weights.float().abs().sum(-1, keepdim=True)
        own = weights @ values[start : start + block]
        made = own if made is None else made + own
        if not gram:
            total = part if total is None else total + part
    assert made is not None
    if total is not None:
        made = made * (site.scale / (total.sqrt() if site.norm == "gelu_l2_norm" else total)).to(made.dtype)
    return made * site.outer if site.outer != 1 else made


def _gram(keys: Tensor, transposed: bool) -> tuple[Tensor]:
    """R ``(in, r)`` with ``|x R| = |x K^T|``: a root of ``K^T K``, so that no sum of squares is cancelled."""
    wide = keys.detach().double()
    wide = wide.t() if transposed else wide
    if wide.shape[0] <= wide.shape[1]:
        return (wide.t().float().contiguous(),)
    return (torch.linalg.qr(wide, mode="r").R.t().float().contiguous(),)
