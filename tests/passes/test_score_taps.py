"""Score taps: one function of masked scores, by blocks of a prompt and token by token alike."""

from __future__ import annotations

import pytest
import torch

from accelpass.ir.attention.spec.op import attend
from accelpass.ir.attention.spec.spec import AttentionMass, AttentionSpec, LastQueries, Places, Step
from accelpass.passes.kv_cache.a2sf import ForgettingMass
from accelpass.passes.kv_cache.keyformer import NoisyMass

TAPS = [ForgettingMass(0.9), NoisyMass(1.0, 2.0, 8, 0), AttentionMass(), LastQueries(ForgettingMass(0.9), 7)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tap", TAPS, ids=lambda tap: tap.part)
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


@pytest.mark.parametrize("tap", TAPS, ids=lambda tap: tap.part)
def test_what_a_tap_says_of_itself(tap):
    """A query without keys gives nothing; of one query those that say so give the probabilities; old sums fade by the decay."""
    scores = torch.randn(1, 2, 2, 3, 9)
    scores[:, :, :, 1] = float("-inf")
    last = Places(torch.arange(6, 9), torch.arange(9), 9)
    others = tap(scores[:, :, :, [0, 2]], last._replace(queries=torch.tensor([6, 8])))
    torch.testing.assert_close(tap(scores, last), others)
    if tap.is_mass_of_one:
        one = tap(scores[:, :, :, 2:], last._replace(queries=torch.tensor([8])))
        torch.testing.assert_close(one, scores[:, :, :, 2].softmax(-1).sum(2))
    if tap.rows is None and not isinstance(tap, NoisyMass):
        before = tap(scores[:, :, :, :1], last._replace(queries=torch.tensor([6]), tokens=7))
        after = tap(scores[:, :, :, :1], last._replace(queries=torch.tensor([6])))
        torch.testing.assert_close(after, before * tap.decay**2)


def test_what_is_no_tap_is_refused():
    with pytest.raises(ValueError, match="key of a ScoreTap"):
        AttentionSpec(statistics=frozenset({"row_sums"}))
