"""VidKV: keys in about 1.5 bits and values in 1.58, for the visual tokens of videos (arXiv 2503.16257)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import blocks
from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec, Step
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.spectrum import SpectrumBlocks, SpectrumKeys, SpectrumSpan
from accelpass.passes.token_pruning.look import visible


@dataclass(frozen=True)
class VidKV(KVPass):
    """Round keys channel by channel over ``block`` tokens: two bits for channels with a wide range, one for the spectrum of the others.

    The others are transformed along the channels (a real Fourier transform, written as a product; queries are transformed instead of the
    keys back), and the sign of each of its numbers is kept, times the mean magnitude. Values are ternary: 0 below half the mean magnitude,
    five numbers to a byte. Keys are stored after the rotary embedding. A prompt attends to exact keys and values.

    Without ``span`` all tokens are rounded, ``window`` at a time, as the authors' code does; with it those of one stretch of the prompt, the
    same in every prompt, alone: the whole groups of it, what is left over is kept as it is. Which channels have a wide range is said by
    a prompt, for each sequence on its own (the authors: by the whole batch) and for good (inferred). The formulas are the paper's; the authors'
    code leaves out the scale of ternary values.

    Attributes:
        bits: of keys, the mean over channels, above 1 and at most 2: so much above 1 is the share of channels with two.
        value_bits: 1.58 (ternary) or 2.
        block: tokens of a group.
        window: newest tokens that are kept as they are, at most; a multiple of ``block``. 128 is the authors'.
        span: first and one past the last of a prompt's visual tokens, counted from its first token that is no padding.
        protect: share of the span whose values have two bits: tokens whose embedding agrees most with the mean of the text's. 0.2 is
            the paper's; at least one group, in whole groups.

    Raises:
        OptionError: bits, a window or a span out of range, or tokens to protect without a span.
    """

    name: ClassVar[str] = "vidkv"
    summary: ClassVar[str] = "keys of a KVCache in about 1.5 bits and values in 1.58, of all tokens or of visual ones"
    paper: ClassVar[str] = "VidKV, arXiv 2503.16257"
    identity: ClassVar[dict[str, Any] | None] = {"window": 1 << 20}
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows", "attention.format"})
    bits: float = 1.5
    value_bits: float = 1.58
    block: int = 32
    window: int = 128
    span: tuple[int, int] | None = None
    protect: float = 0.0

    def __post_init__(self) -> None:
        if not 1 < self.bits <= 2:
            raise self.fail("bits", "a number above 1, at most 2")
        if self.value_bits not in (1.58, 2):
            raise self.fail("value_bits", "1.58 or 2")
        if self.block < 1 or self.window < self.block or self.window % self.block:
            raise self.fail("window", f"a multiple of block={self.block}, which is 1 or more")
        if self.span is not None and (self.span[0] < 0 or self.span[1] - self.span[0] < self.block):
            raise self.fail("span", f"a stretch of block={self.block} tokens or more, (first, one past the last)")
        if not 0 <= self.protect <= 1:
            raise self.fail("protect", "a share of the span between 0 and 1")
        if self.protect and self.span is None:
            raise self.fail("protect", "0 without span, which says where the visual tokens are")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        store: SpectrumKeys = SpectrumBlocks(float(self.bits), float(self.value_bits), self.block, self.window)
        what = f"all but {self.window} tokens at most in {self.bits} and {self.value_bits} bits"
        if self.span is not None:
            length = (self.span[1] - self.span[0]) // self.block * self.block
            if self.span[0] + length >= site.capacity:
                raise self.fail("span", f"places below {site.capacity}, the tokens that the cache has room for")
            safe = min(length, max(self.block, int(length * self.protect) // self.block * self.block))
            safe = safe if self.protect else 0
            shared = store.bits, store.value_bits, store.block
            store = SpectrumSpan(*shared, start=self.span[0], length=length, safe=safe)
            rest = self.span[1] - self.span[0] - length
            what = f"{length} visual tokens in {self.bits} and {self.value_bits} bits, {safe} of them with values in 2"
            what += f"; {rest} fill no group of {self.block} and stay as they are" if rest else ""
        given: dict[str, fx.Node] = {}
        if site.is_prompt:
            found = self._given(program, site, isinstance(store, SpectrumSpan) and store.safe > 0)
            if isinstance(found, str):
                return Skip(found)
            given = found
        give(site.append, given, {}, {"salience": 1} if "salience" in given else {})
        return spec.edited(by=self.name, store=store), what

    def _given(self, program: Program, site: KVSite, salience: bool) -> dict[str, fx.Node] | str:
        """How much padding each sequence begins with, and how much its tokens agree with the text; or why that cannot be told."""
        assert site.attention is not None
        extras = site.attention.args[3]
        assert isinstance(extras, list | tuple)
        masks = tuple(s for s in spec_of(site.attention).before if s.kind in MASKS)
        given: dict[str, fx.Node] = {}
        if masks and spec_of(site.attention).bias != "causal":
            if any(site.append < n for n in extras if isinstance(n, fx.Node)):
                return "which tokens are padding is known only after they are stored"
            (given["padding"],) = inserted(
                program, site.append, partial(_padding, masks), site.attention.args[0], *extras
            )
        if salience:
            first = program.analysis(kv_sites)[0]
            found = next((b for b in program.analysis(blocks) if first.path.startswith(f"{b.path}.")), None)
            if found is None or value(found.input).dim() != 3:
                return "protect: the embeddings that the first layer reads were not found"
            assert self.span is not None
            operands = [found.input, *given.values()]
            (given["salience"],) = inserted(program, site.append, partial(_salience, self.span), *operands)
        return given


def _padding(masks: tuple[Step, ...], q: Tensor, *extras: Tensor) -> list[Tensor]:
    """Tokens of each sequence before the first that the last one may see, ``(batch,)``."""
    seen = visible(masks, q, q, extras)  # a prompt's keys are of the same tokens
    return [(seen.long().cumsum(-1) == 0).sum(-1)]


def _salience(span: tuple[int, int], x: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    """Products of embeddings ``(batch, tokens, channels)`` with the mean of the text's, ``(batch, tokens)``."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    place = place if padding is None else place - padding.unsqueeze(-1)
    text = ((place >= 0) & ((place < span[0]) | (place >= span[1]))).to(torch.float32)
    mean = torch.einsum("btc,bt->bc", x.float(), text) / text.sum(-1, keepdim=True).clamp_min(1)
    return [torch.einsum("btc,bc->bt", x.float(), mean)]
