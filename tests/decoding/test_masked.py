"""Masked-diffusion decoding against the paper's loop, and what it takes on a model that was trained for it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from accelpass.decoding import DecodingError, dparallel
from accelpass.decoding.masked import EntropyThreshold, MaskedDecoder, Step
from accelpass.models_zoo.masked import train
from tests.sweep import examples

MASK, SIZE = 4, 24


def tiny(causal: bool = False, seed: int = 0, scale: float = 0.6) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=scale, is_causal=causal, mask_token_id=MASK,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # certain now and then
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal
    return model


def entropy(logits: Tensor) -> Tensor:
    p = logits.double().softmax(-1)
    return -(p * (p + 1e-12).log()).sum(-1)


def dp_step(logits: Tensor, x: Tensor, end: int, theta: float) -> Tensor:
    """The card's, with the mask itself forbidden."""
    logits = logits.clone()
    logits[:, MASK] = -math.inf
    m = x == MASK
    m[end:] = False
    h = entropy(logits).masked_fill(~m, float("inf"))
    take = m & (h <= theta)
    take[h.argmin()] |= m.any()
    return torch.where(take, logits.argmax(-1), x)


def dp_generate(model: Any, prompt: Tensor, gen: int, block: int, theta: float) -> tuple[Tensor, int]:
    x, nfe = torch.cat([prompt, torch.full((gen,), MASK)]), 0
    blocks = max(1, gen // block)
    for b in range(blocks):
        end = len(x) if b + 1 == blocks else len(prompt) + (b + 1) * block
        while (x[:end] == MASK).any():
            with torch.no_grad():
                x = dp_step(model(x[None]).logits[0], x, end, theta)
            nfe += 1
    return x, nfe


def prompts(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(MASK + 1, SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=examples(6), deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 14), st.integers(1, 6),
    st.sampled_from([-1.0, 0.3, 1.0, 2.0, math.inf]),
)  # fmt: skip
def test_texts_and_calls_are_those_of_the_paper(seed, length, new, block, theta):
    model, ids = tiny(seed=seed), prompts(1, length, seed)
    want, calls = dp_generate(model, ids[0], new, block, theta)
    decoder = dparallel(theta, block)
    seen = list(decoder.steps(model, ids, new))
    assert torch.equal(seen[-1][0], want)
    assert decoder.statistics.calls == calls == len(seen)
    blocks = max(1, new // block)
    assert blocks <= calls <= new
    assert calls == {-1.0: new, math.inf: blocks}.get(theta, calls)
    for before, after in itertools.pairwise(seen):  # what is filled in stays, and blocks are done from left to right
        assert torch.equal(before[before != MASK], after[before != MASK])
    ends = [length + b * block for b in range(1, blocks)]
    for text in seen:
        held = [bool((text[:, length:end] == MASK).any()) for end in ends]
        assert all((text[:, end:] == MASK).all() for end, left in zip(ends, held, strict=True) if left)


def test_a_rule_takes_the_certain_ones_and_at_least_one_of_each_line():
    logits = torch.zeros(2, 4, SIZE)
    logits[0, 1, 7] = logits[1, 2, 9] = 30
    logits[0, 3, 7] = 3
    allowed = torch.tensor([[True, True, True, False], [True, False, False, True]])
    rule = EntropyThreshold(0.5)
    assert rule(logits, allowed).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert not rule(logits, torch.zeros_like(allowed)).any()
    even = math.log(SIZE)
    flat = entropy(logits)[0, 0].item()
    assert abs(flat - even) < 1e-6
    assert (
        EntropyThreshold(flat)(logits, allowed).sum() == 5
        and EntropyThreshold(flat, strict=True)(logits, allowed).sum() == 2
    )


def test_lines_of_a_batch_end_at_steps_of_their_own():
    model, ids = tiny(), prompts(4, 5)
    decoder = dparallel(1.2, 6)
    got, calls = decoder(model, ids, 12), decoder.statistics.calls
    alone = [dp_generate(model, line, 12, 6, 1.2) for line in ids]
    assert torch.equal(got, torch.stack([text for text, _ in alone]))
    assert len({n for _, n in alone}) > 1 and max(n for _, n in alone) <= calls < 12
    # With padding at the left: the same text as without.
    padded, mask = (
        torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids[:1, 2:]], 1),
        torch.ones(1, 5, dtype=torch.int64),
    )
    mask[0, :2] = 0
    assert torch.equal(decoder(model, padded, 12, mask=mask)[:, 5:], decoder(model, ids[:1, 2:], 12)[:, 3:])


def test_models_that_were_causal_once_look_a_row_back():
    """Dream: logits of a position are those of the row before, and the threshold is strict."""
    model, ids = tiny(), prompts(1, 4)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = model.config

        def forward(self, ids: Tensor) -> Any:
            out = model(ids)
            out.logits = torch.cat([out.logits[:, 1:], out.logits[:, :1]], 1)
            return out

    got = dparallel(1.0, 5, shifted=True, strict=True)(Shifted(), ids, 10)
    assert torch.equal(got[0], dp_generate(model, ids[0], 10, 5, 1.0)[0])
    with pytest.raises(DecodingError, match="takes no past_key_values"):
        dparallel(cached=True)(Shifted(), ids, 4)


def card_cached(model: Any, prompt: Tensor, gen: int, block: int, theta: float) -> Tensor:
    """Within a block the keys and values of other rows are those of its first step: attention of each layer by hand."""
    x = torch.cat([prompt, torch.full((gen,), MASK)])
    base, states = model.model, {}
    for b in range(gen // block):
        start, end, first = len(prompt) + b * block, len(prompt) + (b + 1) * block, True
        while (x[:end] == MASK).any():
            rows = torch.arange(len(x)) if first else torch.arange(start, end)
            h = base.embed_tokens(x[None, rows])
            rope = base.rotary_emb(h, position_ids=rows[None])
            for number, layer in enumerate(base.layers):
                inner = layer.self_attn
                normed = layer.input_layernorm(h)
                q, k, v = (
                    f(normed).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (inner.q_proj, inner.k_proj, inner.v_proj)
                )
                q, k = (t * rope[0] + torch.cat([-t[..., 4:], t[..., :4]], -1) * rope[1] for t in (q, k))
                if not first:
                    k, v = (old.index_copy(2, rows, new) for old, new in zip(states[number], (k, v), strict=True))
                states[number] = (k, v)
                mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
                h = h + inner.o_proj(mixed.transpose(1, 2).flatten(2))
                h = h + layer.mlp(layer.post_attention_layernorm(h))
            logits = torch.full((len(x), SIZE), float("nan"))
            logits[rows] = model.lm_head(base.norm(h))[0]
            logits[x != MASK] = 0
            x, first = dp_step(logits.nan_to_num(), x, end, theta), False
    return x


def test_cached_rows_are_computed_alone():
    model, ids = tiny(seed=3, scale=0.3), prompts(1, 6)
    decoder = dparallel(1.5, 5, cached=True)
    got = decoder(model, ids, 10)
    with torch.no_grad():
        assert torch.equal(got[0], card_cached(model, ids[0], 10, 5, 1.5))
    calls, rows = decoder.statistics.calls, decoder.statistics.rows
    assert calls > 2 and rows == 2 * 16 + (calls - 2) * 5  # a block's first call reads all 16 rows, the others its own
    plain = dparallel(1.5, 5)
    plain(model, ids, 10)
    assert plain.statistics.rows == plain.statistics.calls * 16
    # One step a block needs no frozen rows, and with a shift the row before a block is computed as well.
    once = dparallel(math.inf, 5, cached=True)
    assert torch.equal(once(model, ids, 10), dparallel(math.inf, 5)(model, ids, 10))
    shifted = dparallel(1.5, 5, cached=True, shifted=True)
    shifted(model, ids, 10)
    assert shifted.statistics.rows == 2 * 16 + (shifted.statistics.calls - 2) * 6


@pytest.mark.slow
def test_a_compiled_model_writes_the_same():
    model, ids = tiny(), prompts(2, 5)
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": []})
    for cached in (False, True):
        want = dparallel(1.0, 4, cached=cached)(model, ids, 8)
        assert torch.equal(dparallel(1.0, 4, cached=cached)(model, ids, 8, call=fast), want)


def test_a_step_is_exported():
    """The model and the rule as one graph of static shape; a loop around it writes what the decoder writes."""
    model, ids = tiny(), prompts(1, 4)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.step = model, Step(EntropyThreshold(1.0), MASK)

        def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
            return self.step(self.model(text, use_cache=False).logits, text)

    text = torch.cat([ids, torch.full((1, 6), MASK)], 1)
    run = torch.export.export(Whole(), (text,)).module()
    while bool((flags := run(text))[1][0]):
        text = flags[0]
    assert torch.equal(flags[0], dparallel(1.0, 6)(model, ids, 6))


def test_refused():
    model, ids = tiny(), prompts(1, 4)
    unnamed = tiny()
    unnamed.config.mask_token_id = None
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    for run, why in (
        (
            lambda: dparallel()(tiny(causal=True), ids, 4),
            "is causal: it does not see what comes after.*Use model.generate",
        ),
        (lambda: dparallel()(unnamed, ids, 4), "names no mask token.*give mask_id"),
        (lambda: dparallel()(broken, ids, 4), "not numbers"),
        (lambda: dparallel()(model, ids, 0), "new_tokens=0"),
        (lambda: dparallel()(model, ids * 0 + MASK, 4), r"no mask \(4\) in the prompt"),
        (lambda: dparallel()(model, ids, 4, mask=torch.ones(1, 8)), "it is of the prompts"),
        (lambda: dparallel(float("nan")), "threshold=nan"),
        (lambda: dparallel(block=0), "block=0"),
        (lambda: MaskedDecoder(EntropyThreshold(), mask_id=None)(unnamed, ids, 4), "mask_id"),
    ):
        with pytest.raises(DecodingError, match=why):
            run()
    assert (dparallel(mask_id=MASK)(unnamed, ids, 4) != MASK).all()


def test_the_loss_of_certainty_is_the_papers():
    """Cross entropy of both halves of a block, and 2 H at temperature 0.5 of those that are right; halves that make up the block."""
    model = tiny()
    text, start = prompts(3, 40), torch.tensor([[0], [4], [8]])
    given: list[Tensor] = []

    class Spied(nn.Module):
        def forward(self, ids: Tensor, use_cache: bool) -> Any:
            given.append(ids)
            return model(ids)

    old, train.MASK = train.MASK, MASK
    try:
        torch.manual_seed(0)
        got = train.certainty_loss(Spied(), text, start)
    finally:
        train.MASK = old
    at = torch.arange(40)
    later = at >= start + train.BLOCK
    total = torch.zeros(())
    masks = [(ids == MASK) & ~later for ids in given]
    assert not (masks[0] & masks[1]).any() and torch.equal(masks[0] | masks[1], (at >= start) & ~later)
    for ids, m in zip(given, masks, strict=True):
        assert ((ids == MASK) == (m | later)).all()
        rows = model(ids).logits
        logits = torch.cat([rows[:, :1], rows[:, :-1]], 1)
        total = total + nn.functional.cross_entropy(logits[m], text[m])
        ok = m & (logits.argmax(-1) == text)
        total = total + (2 * entropy(logits[ok] / 0.5).mean() if ok.any() else 0)
    torch.testing.assert_close(got, total.to(got.dtype), rtol=1e-4, atol=1e-5)


def test_the_distilled_model_takes_fewer_steps():
    from accelpass.models_zoo import bytes_moe
    from accelpass.models_zoo.masked.model import masked

    ids, calls = bytes_moe.tokens(b"The value of the expression is the ")[None], []
    for name in ("masked_bytes_teacher", "masked_bytes"):
        decoder = dparallel(0.5, 32, shifted=True)
        text = decoder(masked(name), ids, 32)
        assert text.shape == (1, ids.shape[1] + 32) and (text != 2).all()
        calls.append(decoder.statistics.calls)
    assert calls[1] <= 0.6 * calls[0]
