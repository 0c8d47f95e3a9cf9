"""Scores of published methods as one function each: of masked scores, by blocks of a prompt and token by token alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from accelpass import KVCache
from accelpass.ir.attention.spec.op import attend
from accelpass.ir.attention.spec.spec import AttentionMass, AttentionSpec, Places, ScoreTap, Step
from accelpass.passes.kv_cache.h2o import H2O, HeavyHitters
from tests.passes import kv_truth
from tests.passes.kv_truth import attending, fed
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens


@dataclass(frozen=True)
class Forgetting(ScoreTap):
    """A2SF (arXiv 2407.20485): probabilities, those of older queries discounted."""

    part: ClassVar[str] = "a2sf_score"
    alpha: float

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        tokens = at.tokens if isinstance(at.tokens, int) else at.tokens[0]
        weight = self.alpha ** (tokens - 1 - at.queries).float()
        return torch.einsum("bhgqk,q->bhk", torch.nan_to_num(scores.softmax(-1)), weight)


@dataclass(frozen=True)
class Tempered(ScoreTap):
    """Keyformer (arXiv 2403.09054): a softmax of noisy scores whose temperature rises with each step."""

    part: ClassVar[str] = "keyformer_score"
    start: float
    rise: float

    def temperature(self, step: Tensor) -> Tensor:
        return self.start + self.rise * step

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        step = torch.as_tensor(at.step, device=scores.device).reshape(-1, 1, 1, 1, 1)
        noise = gumbel(at.queries[:, None], at.keys.clamp_min(0)[..., None, None, :])
        return torch.nan_to_num(((scores + noise) / self.temperature(step)).softmax(-1)).sum((2, 3))


def gumbel(query: Tensor, key: Tensor) -> Tensor:
    """Noise that depends on positions alone, so that any order of computation sees the same."""
    hashed = (query * 7919 + key * 104729 + 12345) * 2654435761 % 4294967296
    return -torch.log(-torch.log((hashed.double() + 0.5) / 4294967296)).float()


@dataclass(frozen=True)
class Discounted(HeavyHitters):
    part: ClassVar[str] = "a2sf"
    alpha: float = 0.5

    @property
    def tap(self) -> ScoreTap:
        return Forgetting(self.alpha)

    def carried(self, score: Tensor, tokens: int) -> Tensor:
        return score * self.alpha**tokens


@dataclass(frozen=True)
class Keys(HeavyHitters):
    part: ClassVar[str] = "keyformer"

    @property
    def tap(self) -> ScoreTap:
        return Tempered(1.0, 0.1)


@dataclass(frozen=True)
class Scored(H2O):
    """As ``h2o``, with the storage that a test gives it."""

    name: ClassVar[str] = "scored"
    storage: ClassVar[HeavyHitters] = Discounted(0.2, 0.2)

    def edited(self, program, site, spec, number):
        return spec.edited(by=self.name, store=self.storage), "scored"


@dataclass(frozen=True)
class Keyed(Scored):
    name: ClassVar[str] = "keyed"
    storage: ClassVar[HeavyHitters] = Keys(0.2, 0.2)


class A2SF(kv_truth.H2O):
    """The card's recursion."""

    def scored(self, layer, score, p):
        rows = p.shape[3]
        weight = 0.5 ** torch.arange(rows - 1, -1, -1)
        return score * 0.5**rows + torch.einsum("bhgqk,q->bhk", p, weight)


class Keyformer(kv_truth.H2O):
    """The card's second softmax; of ``log p``, which differs from the scores by a number for each query."""

    def scored(self, layer, score, p):
        rows, total = p.shape[3:]
        step = total - layer.get("prompt", total)
        if "prompt" not in layer or rows > 1:
            layer["prompt"] = total
        noise = gumbel(torch.arange(total - rows, total)[:, None], torch.arange(total))
        return score + torch.nan_to_num(((p.log() + noise) / (1 + 0.1 * step)).softmax(-1)).sum((2, 3))


@pytest.mark.parametrize(("chosen", "oracle"), [(Scored(), A2SF(0.2, 0.2)), (Keyed(), Keyformer(0.2, 0.2))])
def test_a_score_is_one_function(chosen, oracle):
    """In a prompt, token by token, and for several tokens at once; padding gives nothing and gets nothing."""
    model, pieces = llama(), tokens(2, 20, *[1] * 6, 9, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    got = fed(compiled(model, chosen), KVCache(model, CAPACITY, 2), pieces, padding)
    with attending(model, oracle) as dense:
        want = fed(model, dense, pieces, padding)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tap", [Forgetting(0.9), Tempered(1.0, 0.1), AttentionMass()], ids=lambda tap: tap.part)
def test_blocks_of_rows_add_up(tap, causal):
    """A prompt longer than a block: the sum over blocks is what all scores at once give."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 500, 8), torch.randn(2, 2, 500, 8), torch.randn(2, 2, 500, 8)
    spec = AttentionSpec(groups=2, causal=causal, steps=(Step("softmax"),), statistics=frozenset({tap.key}))
    assert spec == AttentionSpec.from_json(spec.to_json())
    whole, sums = attend(q, k, v, [], spec)
    out, by_blocks = torch.ops.accelpass.attention_blocks(q, k, v, [], spec.to_json())
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(by_blocks, sums[tap.key], rtol=1e-4, atol=1e-5)


def test_what_is_no_tap_is_refused():
    with pytest.raises(ValueError, match="key of a ScoreTap"):
        AttentionSpec(statistics=frozenset({"row_sums"}))
