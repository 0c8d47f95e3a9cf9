"""Speculative Jacobi decoding against the paper's step, its windows, guidance by two halves, and images that are drawn with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelpass import KVCache, decoding
from accelpass.decoding import DecodingError, Guidance, Proposal, Request, SpeculativeJacobi, Verified, exact
from accelpass.models_zoo.pixels import model as pixels
from accelpass.models_zoo.pixels import train
from tests.decoding.test_acceptance import asked, chi_square, drawn, followed, of_every, tiny
from tests.passes.test_kv_methods import llama
from tests.public.test_kv_cache import settled
from tests.sweep import examples


def card_verify(x: Tensor, q: Tensor, p: Tensor, uniform: Tensor, fresh: Tensor) -> tuple[int, list[int]]:
    """One text: ``x`` (W,) tokens, ``q`` (W, V) what they were drawn from, ``p`` (W, V) what the model says after each."""

    def draw(probs: Tensor, number: Tensor) -> int:
        return int((probs.cumsum(-1) < number).sum().clamp(max=probs.numel() - 1))

    y = [draw(p[j], fresh[j]) for j in range(len(x))]
    m = len(x)
    for i in range(1, len(x)):
        if uniform[i] < (p[i - 1][x[i]] / q[i][x[i]].clamp_min(1e-20)).clamp(max=1):
            y[i - 1] = int(x[i])
        else:
            rest = (p[i - 1] - q[i]).clamp_min(0)
            y[i - 1] = draw(rest / rest.sum(), fresh[i - 1])
            return i, y
    return m, y


@settings(max_examples=examples(2), deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_a_step_gives_what_the_papers_step_gives(seed, window):
    """Committed tokens and how many, of many draws of one window: both have one distribution."""
    torch.manual_seed(seed)
    draws, size = 1500, 4
    p, q = (torch.randn(window, size) * 1.5).softmax(-1), (torch.randn(window, size) * 1.5).softmax(-1)
    x = torch.randint(size, (window,))
    sure = torch.nn.functional.one_hot(x[-1], size).float()  # the last is an initial token
    q[-1] = sure
    read = x.expand(draws, -1)
    got = exact(
        read,
        p.log().expand(draws, -1, -1),
        Proposal(read[:, 1:], q[1:].expand(draws, -1, -1)),
        asked(read, samples=True),
    )
    uniform, fresh = torch.rand(draws, window), torch.rand(draws, window)

    def cell(m: int, y: list[int]) -> int:
        return m * size**2 + y[m - 1] * size + y[m % window]  # the token committed last, and the first that is left

    want = torch.zeros((window + 1) * size**2)
    found = torch.zeros_like(want)
    for i in range(draws):
        m, y = card_verify(x, q, p, uniform[i], fresh[i])
        want[cell(m, y)] += 1
        found[cell(int(got.counts[i]) + 1, got.tokens[i].tolist())] += 1
    both = (want + found) > 10
    statistic = ((want - found)[both] ** 2 / (want + found)[both]).sum()
    free = max(1, int(both.sum()) - 1)
    assert statistic < free * (1 - 2 / (9 * free) + 4.5 * (2 / (9 * free)) ** 0.5) ** 3


def request(batch: int = 2, size: int = 6, **more: Any) -> Request:
    model = tiny()
    model.config.vocab_size = size
    return Request(model, torch.zeros((batch, 1), dtype=torch.int64), None, None, 99, **more)


def said(tokens: Tensor, size: int, seed: int = 0) -> Verified:
    """A call that accepted all but the last two tokens."""
    logits = torch.randn(*tokens.shape, size, generator=torch.Generator().manual_seed(seed))
    return Verified(tokens, torch.full((len(tokens),), tokens.shape[1] - 3), None, tokens, tokens, logits)


def test_a_window_begins_with_what_is_left_and_is_filled_up():
    """The card's next window: drafts with what they were drawn from, then initial tokens that have all the probability."""
    asks = request(samples=True, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    for initial, row, want in (("repeat", None, [5, 5, 5]), ("repeat", 4, [2, 3, 4]), ("random", None, None)):
        drafter = SpeculativeJacobi(initial, row, (0, 3) if initial == "random" else None).start(asks)
        call = said(tokens, 6)
        drafter.observe(call, 2)
        made = drafter.propose([[0, 1, 2, 3], [0, 5, 4, 3]], 5)
        assert made is not None and made.probs is not None
        assert torch.equal(made.tokens[:, :2], tokens[:, 3:])
        assert torch.equal(made.probs[:, :2], call.logits[:, 3:].softmax(-1))
        assert torch.equal(made.probs[:, 2:].argmax(-1), made.tokens[:, 2:]) and (made.probs[:, 2:].amax(-1) == 1).all()
        if want is None:
            assert made.tokens[:, 2:].max() < 3
        else:
            assert made.tokens[0, 2:].tolist() == want
    # Drawn anew from the distribution of the position above: with certain ones, its tokens.
    drafter = SpeculativeJacobi("sample", 4).start(asks)
    sure = torch.nn.functional.one_hot(tokens, 6) * 1e4
    drafter.observe(Verified(tokens, torch.tensor([2, 2]), None, tokens, tokens, sure.float()), 2)
    made = drafter.propose([[0, 1, 2, 3], [0, 5, 4, 3]], 5)
    assert made is not None and made.tokens[:, 2:].tolist() == [[2, 3, 4], [4, 3, 2]]


def test_windows_are_of_images_alone():
    drafter = SpeculativeJacobi(interval=(2, 6)).start(request(1))
    proposed = [drafter.propose([[0] * n], 3) for n in range(1, 9)]  # a prompt of one token, then new ones
    assert [0 if p is None else p.count for p in proposed] == [0, 0, 3, 3, 2, 1, 0, 0]


def test_accepted_guesses_that_a_neighbour_holds_back_are_kept():
    """The release throws them away; here the next call accepts them, as they have the distribution that it computes anew."""
    asks = request(samples=True)
    drafter = SpeculativeJacobi().start(asks)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
    call = said(tokens, 6)
    call = Verified(tokens, torch.tensor([2, 0]), None, tokens, tokens, call.logits)
    drafter.observe(call, 0)
    made = drafter.propose([[0, 1], [0, 4]], 2)
    assert made is not None
    read = torch.cat([torch.tensor([[1], [4]]), made.tokens], 1)
    logits = torch.cat([call.logits[:, 1:], call.logits[:, :1]], 1)
    for _ in range(20):
        assert exact(read, logits, made, asks).counts.tolist() == [2, 2]


def guided(model: Any, ids: Tensor, without: Tensor, scale: float) -> Tensor:
    """Logits of all positions, the card's mix."""
    with torch.no_grad():
        wanted = model(ids).logits
        other = model(torch.cat([without.expand(len(ids), -1), ids[:, without.shape[-1] :]], 1)).logits
    return other + scale * (wanted - other)


def test_guided_texts_are_those_of_a_plain_loop():
    model = settled(llama())
    ids = torch.tensor([[5, 6, 7, 8], [9, 6, 3, 8]])
    without = torch.tensor([1, 2, 3, 4])
    want = ids
    for _ in range(12):
        want = torch.cat([want, guided(model, want, without, 2.5)[:, -1:].argmax(-1)], 1)
    for name in ("sjd", "prompt_lookup"):
        rule = Guidance(2.5, without)
        decoder = (
            decoding.sjd(4, rule)
            if name == "sjd"
            else decoding.prompt_lookup(guidance=rule, sizes=(1, 4), adaptive=False)
        )
        decoder.prepare(model, cache := KVCache(model, 40, 4))
        got = model.generate(ids, past_key_values=cache, custom_generate=decoder, do_sample=False, max_new_tokens=12)
        assert torch.equal(got, want), name
    plain = model.generate(ids, do_sample=False, max_new_tokens=12)
    again = decoding.sjd(4, Guidance(1.0, lambda prompt: prompt * 0 + 1))
    assert torch.equal(model.generate(ids, custom_generate=again, do_sample=False, max_new_tokens=12), plain)
    padded = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # padding is that of both halves
    plain = model.generate(ids, attention_mask=padded, do_sample=False, max_new_tokens=12)
    again = decoding.sjd(4, Guidance(0.0, ids))
    got = model.generate(ids.flip(0), attention_mask=padded, custom_generate=again, do_sample=False, max_new_tokens=12)
    assert torch.equal(got[:, 4:], plain[:, 4:])


@pytest.mark.parametrize("initial", ["random", pytest.param("sample", marks=pytest.mark.slow)])
def test_drawn_images_have_the_guided_distribution(initial):
    """Texts of three tokens of a batch, against their probabilities under the mix."""
    model, batch, draws = tiny(), 50, 4000
    ids, without = torch.tensor([[1, 3, 2]]), torch.tensor([4, 0, 2])
    decoder = decoding.sjd(3, Guidance(1.7, without), initial, row=2, generator=torch.Generator().manual_seed(1))
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 3}
    counts = drawn(model, ids, decoder, KVCache(model, 24, 2 * batch), draws, batch, **how)
    logits = guided(model, followed(ids), without, 1.7)[:, 2:-1]
    assert chi_square(counts, of_every(logits)) < 1


def images(decoder: Any, model: Any, labels: Tensor) -> Tensor:
    held = {} if decoder is None else {"custom_generate": decoder}
    made: Tensor = model.generate(
        pixels.prompts(labels), attention_mask=torch.ones(len(labels), 1, dtype=torch.int64), do_sample=True, top_k=0,
        max_new_tokens=pixels.PIXELS, **held,
    )  # fmt: skip
    return made[:, 1:]


def test_digits_are_drawn_in_fewer_calls():
    """A whole image each; the classifier reads most of them as what they were asked to be."""
    model, _ = pixels.load(torch.float32)
    torch.manual_seed(0)
    rule = Guidance(2.0, torch.tensor([pixels.NO_CLASS]))
    decoder, calls, right = decoding.sjd(16, rule, tokens=(0, pixels.GREYS)), 0, 0
    for number in range(5):
        label = torch.tensor([number])
        right += int((pixels.read_as(images(decoder, model, label)) == label).sum())
        calls += decoder.statistics.calls
    assert calls < 0.5 * 5 * (pixels.PIXELS - 1)
    assert right >= 4


@pytest.mark.slow
def test_the_classifier_reads_digits_as_well_as_plain_ones():
    model, _ = pixels.load(torch.float32)
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    unseen, truth = pixels.images(held_out=True)
    with torch.no_grad():
        assert train.loss_of(model, pixels.prompts(truth), unseen) < 1.3  # nats of log 17 = 2.83
    shares = [(pixels.read_as(images(way, model, labels)) == labels).float().mean() for way in (None, decoding.sjd(16))]
    assert min(shares) > 0.85 and abs(shares[0] - shares[1]) < 0.08


def test_refused():
    model, ids = settled(llama()), torch.tensor([[5, 6, 7]])
    how: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4}
    for wrong, why in (
        (lambda: decoding.sjd(0), "window=0"),
        (lambda: decoding.sjd(initial="zeros"), "'random', 'repeat' or 'sample'"),
        (lambda: decoding.sjd(row=0), "row=0"),
        (lambda: decoding.sjd(tokens=(4, 4)), r"tokens=\(4, 4\)"),
        (lambda: decoding.sjd(interval=(-1, 4)), "interval="),
        (lambda: Guidance(float("nan"), ids), "scale of nan"),
    ):
        with pytest.raises(DecodingError, match=why):
            wrong()
    with pytest.raises(DecodingError, match="vocabulary of 96; give the image's part"):
        model.generate(ids, custom_generate=decoding.sjd(tokens=(0, 97)), **how)
    with pytest.raises(DecodingError, match="equally many tokens; pad the shorter"):
        model.generate(ids, custom_generate=decoding.sjd(guidance=Guidance(3.0, ids[:, 1:])), **how)
    cache = KVCache(model, 24)
    with pytest.raises(DecodingError, match=r"cache holds 1 sequences; use KVCache\(model, capacity, 2\)"):
        model.generate(ids, past_key_values=cache, custom_generate=decoding.sjd(guidance=Guidance(3.0, ids)), **how)
    with pytest.raises(DecodingError, match="UnbatchedClassifierFreeGuidance"):
        model.generate(ids, custom_generate=decoding.sjd(), guidance_scale=3.0, **how)
