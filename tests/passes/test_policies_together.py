"""Policies that share a model: of denoising steps on blocks of their own, of layers and of tokens; what cannot be is named."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import accelpass
from accelpass import KVCache, PassError
from accelpass.passes.core.staged import FULL
from accelpass.passes.token_pruning.lazyllm import LazyLLM
from tests.passes.gemfilter_truth import KEEP, built, chosen, logits, prompt_of, steps
from tests.passes.step_truth import DeltaBlock, denoise, fast_attention
from tests.passes.test_ditfastattn import TIMES, model_of

FAST = {
    "name": "ditfastattn",
    "methods": {"transformer_blocks.0.attn1": "FCWAXW"},
    "timesteps": list(TIMES),
    "window": 3,
}
DELTA = {"name": "delta_cache", "start": 1, "interval": 2, "include": ["transformer_blocks.1"]}


def compiled(model: Any, *passes: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager"})


@pytest.mark.slow
def test_two_step_passes_on_blocks_of_their_own():
    model, call = model_of("dit")
    truth = fast_attention(copy.deepcopy(model), FAST["methods"], 3)
    truth.transformer_blocks[1] = DeltaBlock(truth.transformer_blocks[1], 1, 2, False)
    fast = compiled(model, {**FAST, "exclude": ["transformer_blocks.1.*"]}, DELTA)
    for _ in range(2):
        for found, wanted in zip(denoise(fast, call, TIMES), denoise(copy.deepcopy(truth), call, TIMES), strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    took = accelpass.explain(fast).passes
    assert list(took["delta_cache"].took) == ["transformer_blocks.1"]
    assert list(took["ditfastattn"].took) == ["transformer_blocks.0.attn1"]


def test_two_step_passes_on_one_block():
    model, call = model_of("dit")
    said = r"ditfastattn and delta_cache both choose what a block computes \(transformer_blocks.1, for one\).*include="
    with pytest.raises(Exception, match=said):
        denoise(compiled(model, FAST, DELTA), call, TIMES)


def without(model: Any, layer: int) -> Any:
    """The same model, of which a layer is gone."""
    less = copy.deepcopy(model)
    del less.model.layers[layer]
    for number, one in enumerate(less.model.layers):
        one.self_attn.layer_idx = number
    less.config.num_hidden_layers -= 1
    return less


@pytest.mark.slow
def test_tokens_are_chosen_by_the_layers_that_are_left():
    model = built()
    less = without(model, 1)
    gem = {"name": "gemfilter", "keep": KEEP, "layer": 1}
    fast = compiled(model, gem, {"name": "skip_layers", "layers": [1]})
    for n in (20, 33):
        ids = prompt_of(1, n, seed=n)
        rows = chosen(less, ids, layer=1)
        got = logits(fast, KVCache(model, 40), ids, *steps())
        want = logits(less, KVCache(less, 40), ids.gather(1, rows), *steps())
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_shortened_prompt_and_fewer_layers_later():
    model, ids = built(), prompt_of(1, 20)
    by = {"name": "skip_layers", "least": 2, "start": KEEP, "horizon": KEEP + 2}
    fast, plain = compiled(model, {"name": "gemfilter", "keep": KEEP, "layer": 1}, by), copy.deepcopy(model)
    got = logits(fast, KVCache(model, 40), ids, *steps())
    rows = torch.tensor(accelpass.surviving_tokens(fast)[0].kept)
    want = logits(compiled(plain, by), KVCache(plain, 40), ids.gather(1, rows), *steps())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_two_policies_that_run_the_stages_themselves():
    model = built()
    fast = compiled(model, {"name": "lazyllm", "keep": [0.5], "layers": [0]}, {"name": "skip_layers", "least": 2})
    with pytest.raises(Exception, match="lazyllm and skip_layers both choose what a block computes"):
        logits(fast, KVCache(model, 40), prompt_of(1, 20), *steps(count=1))


@pytest.mark.slow
@dataclass(frozen=True)
class Unforeseen(LazyLLM):
    """Takes twenty tokens up at once, in a variant that a test names."""

    action: str = FULL
    name: ClassVar[str] = "unforeseen"

    def pieces(self, missing: Tensor, count: int, own: int) -> list[tuple[str, Tensor]]:
        return [(self.action, torch.zeros((missing.shape[0], 20), dtype=torch.long))]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            "20 rows",
            r"unforeseen: model.layers.1 was not compiled as '20 rows'; name it in ways\(\), which gave 16 rows",
        ),
        pytest.param(
            "16 rows",
            r"unforeseen: model.layers.1 as '16 rows' takes positions:1 of \[1, 16\], and was given \[1, 20\]; give",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sizes_and_variants_that_nobody_declared(action: str, said: str):
    model, ids = built(), prompt_of(1, 20)
    fast, cache = compiled(model, Unforeseen(keep=(0.5,), layers=(0,), action=action)), KVCache(model, 40)
    logits(fast, cache, ids)
    with pytest.raises(PassError, match=said):
        logits(fast, cache, *steps(count=1))
