"""SpAtten's cascade: tokens that all layers so far have looked at least leave the model, layer by layer (arXiv 2012.09852)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.block_select import causal_form, changed_scores
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.sequence.removal import Rows, ShrinkingSequence
from accelpass.ir.transform.splice import all_or_nothing
from accelpass.ir.transform.steps import survived
from accelpass.ir.transform.tokens import CannotCut, Stretch, decoder_blocks, ready
from accelpass.passes.core.base import Done, Pass, Record
from accelpass.passes.token_pruning.choice import attention_mass, highest
from accelpass.passes.token_pruning.gone import keep_what_is_left, read_what_is_left, why_none_may_leave


@dataclass(frozen=True)
class SpAtten(Pass):
    """Layer by layer, the tokens of a prompt that got least attention so far leave it for good; caches hold those that are left.

    Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021. A token's score
    is the probability that it got, summed over queries, heads and all layers so far; of a prompt of N tokens ``ceil(r * N)`` go on
    from a layer, where r falls evenly from 1 behind the first layers to ``keep`` behind the last (the card's schedule, by a third
    party). What has left is in no later layer's queries, keys, values or MLP, and in no later step's attention. The last token
    of a text always stays, and the first of a sequence whose tokens see each other (inferred). Each score costs a second
    product of queries and keys. Works with encoders, with prompts, and with an ``accelpass.KVCache``.

    Of the paper this is cascade token pruning of prompts. Generated tokens add to no score, and none of them leaves. Its local value
    pruning and its progressive quantization are ways to read a cache, and passes of their own; so is its cascade of heads.

    Attributes:
        keep: share of a prompt's tokens that is left at the end; 1 is the dense model.
        dense: share of the layers, the first ones, that all tokens pass.
        first: so many layers they pass at least.

    Raises:
        OptionError: a share or a number out of range.
    """

    keep: float = 0.5
    dense: float = 0.15
    first: int = 3

    name: ClassVar[str] = "spatten"
    phase: ClassVar[str] = "attention"
    summary: ClassVar[str] = "tokens that layers so far looked at least leave a prompt for good, layer by layer"
    paper: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    for_prompts: ClassVar[bool] = True
    claims: ClassVar[dict[str, str]] = {"tokens": "tokens leave a prompt layer by layer, for good"}

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise self.fail("keep", "a share of the tokens above 0, at most 1, which is the dense model")
        if not 0 <= self.dense <= 1:
            raise self.fail("dense", "a share of the layers from 0 to 1")
        if self.first < 0:
            raise self.fail("first", "a number of layers, 0 or more")

    def rates(self, layers: int) -> dict[int, float]:
        """By number of a layer behind which tokens leave: the share of all tokens that goes on."""
        first = max(self.first, math.ceil(self.dense * layers))
        rates = {
            n: max(0.01, 1 + (self.keep - 1) / (layers - first) * (n - first + 1)) for n in range(first, layers - 1)
        }
        return {n: rate for n, rate in rates.items() if rate < 1}

    def apply(self, program: Program, record: Record) -> None:
        sites = program.analysis(kv_sites)
        is_prompt = not sites or sites[0].is_prompt
        if is_prompt:
            program.survivors = {}
        try:
            found = self._stretches(program, sites)
        except CannotCut as why:
            record.skip("model", str(why))
            return
        shown = found[0].blocks[-1]
        if not is_prompt:
            read_what_is_left(program, self, _behind(program, found))
            record.take(shown, Done("later layers read what is left of the prompt"))
            return
        try:
            why_not = next((w for s in found for n in s.attentions if (w := _uncounted(n))), None)
            if why_not is not None:
                raise CannotCut(why_not)
            with all_or_nothing(program):
                rows, said = self._prompt(program, found)
        except CannotCut as why:
            rows = []
            record.skip("model", str(why))
        else:
            record.take(shown, Done(said))
        if sites:
            left = {stretch.number: row for stretch, row in zip(found[1:], rows, strict=False)}  # none if none leaves
            keep_what_is_left(program, self, _behind(program, found), left)

    def _stretches(self, program: Program, sites: Sequence[KVSite]) -> list[Stretch]:
        layers = decoder_blocks(program)
        rates = self.rates(len(layers))
        if not rates:
            raise CannotCut(f"keep={self.keep}, first={self.first}: no token leaves between its {len(layers)} layers")
        why = why_none_may_leave(program, sites, [n for n in program.graph.nodes if is_attention(n)])
        if why is not None:
            raise CannotCut(why)
        return ready(program, tuple(rates))

    def _prompt(self, program: Program, found: Sequence[Stretch]) -> tuple[list[fx.Node], str]:
        """Let the layers run on fewer and fewer tokens; the rows of each stretch but the first."""
        rates, tokens = list(self.rates(len(decoder_blocks(program))).values()), value(found[0].start).shape[1]
        run, score, rows = ShrinkingSequence(program, found), None, []
        causal = _is_causal(found[0].attentions[0])
        for stretch, rate in zip(found[1:], rates, strict=True):
            for attention in run.attentions:
                more: list[fx.Node] = [] if score is None else [score]
                (score,) = run.make(_scored(spec_of(attention).scale, causal), *attention.args[:2], *more)
            assert score is not None
            chosen, score = run.make(_choice(rate, causal), score, found[0].start)
            run.go_on(stretch, Rows(chosen))
            assert run.rows is not None
            rows.append(run.rows)
        run.finish()
        for stretch, left in zip(found[1:], rows, strict=True):
            survived(program, stretch.blocks[0], left, tokens)
        return rows, f"tokens leave behind each of {len(rates)} layers, to {rates[-1]:.0%} of them at the last"


def _behind(program: Program, found: Sequence[Stretch]) -> dict[int, list[KVSite]]:
    """The layers of caches of each stretch but the first, as the graph is now."""
    sites = {site.attention: site for site in kv_sites(program)}
    return {s.number: [sites[n] for n in s.attentions if n in sites] for s in found[1:]}


def _uncounted(attention: fx.Node) -> str | None:
    """Why what tokens get in an attention is not theirs alone, or None."""
    spec = spec_of(attention)
    if spec.kind == "cross" or value(attention).dim() != 4:
        return f"{spec.site}: its attention is not one of a sequence's tokens to each other"
    if spec.bias == "tensor":
        return (
            f"{spec.site}: its mask may hide padding, whose queries would be counted; give each prompt without a mask"
        )
    return changed_scores(causal_form(spec, 1, 1))


def _is_causal(attention: fx.Node) -> bool:
    return spec_of(attention).causal or spec_of(attention).bias == "causal"


def _scored(scale: float, is_causal: bool) -> Any:
    def run(q: Tensor, k: Tensor, *score: Tensor) -> list[Tensor]:
        """What tokens got before, and get here."""
        mass = attention_mass(q, k, scale, is_causal)
        return [mass + score[0] if score else mass]

    return run


def _choice(rate: float, is_causal: bool) -> Any:
    def run(score: Tensor, every: Tensor) -> list[Tensor]:
        """The tokens that go on, ascending, and their scores."""
        at = torch.arange(score.shape[1], device=score.device)
        pinned = at == (score.shape[1] - 1 if is_causal else 0)
        chosen = highest(score.masked_fill(pinned, torch.inf), math.ceil(rate * every.shape[1]))
        return [chosen, score.gather(1, chosen)]

    return run
