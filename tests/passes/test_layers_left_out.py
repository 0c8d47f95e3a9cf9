"""Layers that a decoder's tokens leave out, against the same loop over the model's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import CacheError, OptionError
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from accelpass.passes.structure.early_exit import EarlyExit
from accelpass.passes.structure.skip_layers import SkipLayers
from tests.sweep import sweep

LAYERS, PROMPT, ANSWER = 4, 6, 5
Act = Callable[[int, int, Tensor], str]
"""By layer, position and the stream in front of the layer: ``run``, ``skip``, or ``copy`` (keys and values alone)."""


def model_of(seed: int = 0) -> Any:
    return small.decoder(seed, LAYERS)


def ids(seed: int, batch: int = 1) -> Tensor:
    words = torch.Generator().manual_seed(seed)
    return torch.randint(0, small.VOCABULARY, (batch, PROMPT + ANSWER), generator=words)


def compiled(model: Any, *passes: dict[str, Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@torch.no_grad()
def answered(fast: Any, cache: Any, given: Tensor) -> list[Tensor]:
    """Logits of the prompt's last token and of the tokens after it, one by one."""
    made = [fast(given[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    for at in range(PROMPT, given.shape[1]):
        made.append(fast(given[:, at : at + 1], past_key_values=cache, logits_to_keep=1).logits[:, -1])
    return made


@torch.no_grad()
def oracle(model: Any, given: Tensor, act: Act) -> list[Tensor]:
    inner, cache, made = model.model, DynamicCache(), []
    for low, high in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, given.shape[1]))]:
        positions = torch.arange(low, high)[None].expand(given.shape[0], -1)
        stream = inner.embed_tokens(given[:, low:high])
        rotary = inner.rotary_emb(stream, positions)
        for number, layer in enumerate(inner.layers):
            what = act(number, low, stream)
            if what != "skip":
                new = layer(stream, position_embeddings=rotary, past_key_values=cache, position_ids=positions)
                stream = new if what == "run" else stream
        made.append(model.lm_head(inner.norm(stream))[:, -1])
    return made


def check(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_fixed_layers_are_gone_from_prompt_and_answer():
    model = model_of()
    fast = compiled(model, {"name": "skip_layers", "layers": [1, 3]})
    for seed in (1, 2):
        given = ids(seed, batch=2)
        wanted = oracle(model, given, lambda layer, position, stream: "skip" if layer in (1, 3) else "run")
        check(answered(fast, KVCache(model, 16, batch_size=2), given), wanted)


BY_POSITION = {"name": "skip_layers", "least": 2, "start": PROMPT, "horizon": PROMPT + 4}


@pytest.mark.slow
def test_later_tokens_run_fewer_layers_and_a_second_prompt_begins_anew():
    model, by = model_of(), SkipLayers(least=2, start=PROMPT, horizon=PROMPT + 4)
    fast, cache = compiled(model, BY_POSITION), KVCache(model, 16)
    assert [list(by.skipped(LAYERS, at)) for at in (0, 7, 8, 9, 10, 99)] == [[], [], [1], [1, 2], [1, 2], [1, 2]]

    def act(layer: int, position: int, stream: Tensor) -> str:
        return "skip" if layer in by.skipped(LAYERS, position) else "run"

    for seed in (1, 2):
        cache.reset()
        check(answered(fast, cache, ids(seed)), oracle(model, ids(seed), act))
    graphs = accelpass.explain(fast).graphs
    with pytest.raises(CacheError, match="different numbers of tokens"):
        cache.crop(-1)
    assert len(graphs) == 2  # no step was compiled for itself


@pytest.mark.slow
def test_generate_leaves_layers_out():
    model = model_of()
    torch._dynamo.reset()
    model.compile(backend="accelpass", options={"passes": [BY_POSITION], "lowering": "eager"})
    by = SkipLayers(least=2, start=PROMPT, horizon=PROMPT + 4)
    given, text = ids(3)[:, :PROMPT], None
    for _ in range(2):
        made = model.generate(given, past_key_values=KVCache(model, 16), max_new_tokens=ANSWER, do_sample=False)
        assert text is None or torch.equal(made, text)
        text = made
    assert text is not None
    logits = oracle(model, text[:, :-1], lambda layer, at, stream: "skip" if layer in by.skipped(LAYERS, at) else "run")
    assert [int(one.argmax()) for one in logits] == text[0, PROMPT:].tolist()


def gap(model: Any, stream: Tensor) -> float:
    first, second = model.lm_head(model.model.norm(stream)).softmax(-1).topk(2, -1).values.unbind(-1)
    return float((first - second).min())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_exit_where_the_head_is_confident(batch: int):
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    given, gaps = ids(1, batch), []

    def watching(layer: int, position: int, stream: Tensor) -> str:
        if position >= PROMPT and layer in (1, 2):
            gaps.append(gap(model, stream))
        return "run"

    oracle(model, given, watching)
    threshold, left = sum(sorted(gaps)[len(gaps) // 2 - 1 :][:2]) / 2, {}

    def act(layer: int, position: int, stream: Tensor) -> str:
        if position >= PROMPT and layer in (1, 2) and position not in left and gap(model, stream) > threshold:
            left[position] = layer
        return "copy" if position in left else "run"

    fast = compiled(model, {"name": "early_exit", "layers": [0, 1], "threshold": threshold})
    wanted = oracle(model, given, act)
    assert 0 < len(left) < ANSWER or set(left.values()) == {1, 2}
    check(answered(fast, KVCache(model, 16, batch_size=batch), given), wanted)


@pytest.mark.parametrize("passes", sweep({"name": "skip_layers"}, {"name": "early_exit", "threshold": 1.0}))
def test_identity(passes: dict[str, Any]):
    model = model_of()
    fast, given = compiled(model, passes, {"name": "int8_weights"}), ids(4)
    plain = answered(compiled(model, {"name": "int8_weights"}), KVCache(model, 16), given)
    check(answered(fast, KVCache(model, 16), given), plain)


@pytest.mark.slow
def test_layers_that_the_user_names_stay():
    model = model_of()
    fast = compiled(model, BY_POSITION, skip_sites={"skip_layers": ["model.layers.1"]})
    by = SkipLayers(least=2, start=PROMPT, horizon=PROMPT + 4)
    wanted = oracle(model, ids(1), lambda n, at, stream: "skip" if n in set(by.skipped(LAYERS, at)) - {1} else "run")
    check(answered(fast, KVCache(model, 16), ids(1)), wanted)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"name": "skip_layers", "layers": [0]}, "layer 0 counts the tokens"),
        ({"name": "skip_layers", "layers": [1], "least": 2}, "least=2"),
        ({"name": "skip_layers", "least": 0}, "at least warm_up=1"),
        ({"name": "skip_layers", "warm_up": 0}, "at least 1"),
        ({"name": "skip_layers", "start": 9, "horizon": 9}, "below horizon=9"),
        ({"name": "early_exit", "threshold": 2.0}, "from 0 to 1"),
        ({"name": "early_exit", "layers": [2, 1]}, "ascending"),
    ],
)
def test_options_are_checked(given: dict[str, Any], error: str):
    with pytest.raises(OptionError, match=error):
        make(given)


def test_a_model_of_too_few_layers_is_told():
    with pytest.raises(OptionError, match="at most 2"):
        EarlyExit(layers=(3,)).exits(LAYERS)
    with pytest.raises(OptionError, match=f"below {LAYERS}"):
        SkipLayers(layers=(4,)).spared(LAYERS)


def test_a_cache_pass_that_would_store_variants_in_two_ways_is_refused():
    model = model_of()
    fast = compiled(model, {"name": "early_exit", "threshold": 0.1}, {"name": "h2o", "budget": 0.5})
    with pytest.raises(
        Exception, match="'early_exit' and 'h2o' cannot both have these layers: variants of a block store"
    ):
        answered(fast, KVCache(model, 16), ids(1))
