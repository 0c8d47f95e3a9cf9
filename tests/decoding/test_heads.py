"""Multi-token prediction modules against the model-code's step, exact texts, schedules without verification, and their training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from accelpass import KVCache, decoding
from accelpass.decoding import DecodingError, MTPHeads, exact
from accelpass.decoding.heads import distil, unverified
from accelpass.decoding.heads.training import losses
from accelpass.models_zoo import small
from tests.decoding.test_acceptance import chi_square, drawn, followed, of_every, tiny
from tests.decoding.test_exact import GREEDY, prompt
from tests.passes.test_kv_methods import llama
from tests.public.test_kv_cache import settled
from tests.sweep import examples


def made(model: Any, depth: int = 3, seed: int = 0) -> MTPHeads:
    """Modules that say different things."""
    heads = MTPHeads(model, depth).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return heads


def whole(heads: MTPHeads, ids: Tensor, guesses: int) -> list[int]:
    """The card's cascade without any cache: all rows of all modules of one text, anew for each guess."""
    model, ids = heads.trunk, ids.clone()
    length = ids.shape[1]
    with torch.no_grad():
        states = model.model(ids[:, :-1], use_cache=False).last_hidden_state  # the trunk has not read the last token
        for number in range(guesses):
            level: Any = heads.levels[number]
            rows = states.shape[1]
            tokens = ids[:, number + 1 : number + 1 + rows]
            both = torch.cat([level.norm_token(model.model.embed_tokens(tokens)), level.norm_hidden(states)], -1)
            bias = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
            at = torch.arange(rows)[None] + number + 1
            states = level.layer(
                level.proj(both),
                attention_mask=bias,
                position_ids=at,
                position_embeddings=model.model.rotary_emb(both, at),
            )
            token = model.lm_head(level.norm(states[:, -1:])).argmax(-1)
            ids = torch.cat([ids, token], 1)
    return ids[0, length:].tolist()


def paper_loop(heads: MTPHeads, ids: Tensor, plan: list[int], new: int) -> Tensor:
    """A step of the model on all that is pending, then modules, each on what the one before said; nothing is verified."""
    model, turn = heads.trunk, 0
    length = ids.shape[1]
    with torch.no_grad():
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        while ids.shape[1] - length < new:
            guesses = whole(heads, ids, min(plan[turn % len(plan)], length + new - ids.shape[1]))
            ids = torch.cat([ids, torch.tensor([guesses], dtype=torch.int64)], 1)
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            turn += 1
    return ids[:, : length + new]


@settings(max_examples=examples(3), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([[3], [1], [2, 0, 3]]))
def test_texts_without_verification_are_the_papers(seed, plan):
    model = settled(llama())
    heads = made(model, 3, seed)
    schedule = "".join("M" + "m" * count for count in plan)
    decoder = decoding.mtp_heads(heads, schedule, verify=False)
    ids = prompt()[:, : 5 + seed % 7]
    got = model.generate(
        ids, past_key_values=KVCache(model, 48), custom_generate=decoder, max_new_tokens=14, do_sample=False
    )
    # Near the end fewer rows than a step has are left, and tokens come one by one: those before are the paper's.
    assert torch.equal(got[:, :-3], paper_loop(heads, ids, plan, 14)[:, :-3])
    assert decoder.statistics.calls < 13 or plan == [0]


def test_guesses_follow_the_card_while_texts_grow():
    """The chain of modules with keys and values that are caught up, against one that reads everything anew each time."""
    model = settled(llama())
    heads, asked = made(model), []

    def spied(read: Tensor, logits: Tensor, proposal: Any, request: Any) -> Any:
        if proposal.count:
            asked.append((request.ids, read))
        return exact(read, logits, proposal, request)

    decoder = decoding.mtp_heads(heads, adaptive=False)
    decoder.acceptance = spied
    text = model.generate(prompt(), past_key_values=KVCache(model, 48), custom_generate=decoder, **GREEDY)
    assert torch.equal(text, model.generate(prompt(), **GREEDY))
    assert len(asked) > 5
    for _, read in asked:
        ends = [n for n in range(20, 40) if text[0, n] == read[0, 0]]
        assert any(whole(heads, text[:, : end + 1], 3) == read[0, 1:].tolist() for end in ends)


@pytest.mark.parametrize("way", ["KVCache", "DynamicCache", "begun", "padded", "mixture"])
def test_verified_texts_are_the_models_own(way):
    model = small.experts() if way == "mixture" else settled(llama())
    heads = made(model)
    ids, how = prompt(2) % model.config.vocab_size, dict(GREEDY)
    if way == "padded":
        mask = torch.ones(2, 20, dtype=torch.int64)
        mask[1, :6] = 0
        how["attention_mask"] = mask
    caches = [KVCache(model, 64, 2) if way != "DynamicCache" else DynamicCache() for _ in range(2)]
    decoder = decoding.mtp_heads(heads, adaptive=False)
    for step in range(2 if way == "begun" else 1):  # a second prompt begins with the first one's text
        want = model.generate(ids, past_key_values=caches[0], **how)
        got = model.generate(ids, past_key_values=caches[1], custom_generate=decoder, **how)
        assert torch.equal(got, want), step
        ids = torch.cat([want, ids[:, :5]], 1)


def test_learnt_modules_guess_more():
    """On texts that the model wrote: the loss falls, the model's weights stay, and calls are saved."""
    torch.manual_seed(0)
    model = settled(llama())
    heads = MTPHeads(model, 2)
    texts = [model.generate(prompt(4), max_new_tokens=24, do_sample=False)]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        first = [float(loss) for loss in losses(heads, texts[0])]
    told: list[int] = []
    last = distil(heads, texts, 60, 3e-3, lambda step, _: told.append(step))
    assert len(told) == 60 and not heads.training
    assert all(after < 0.8 * start for after, start in zip(last, first, strict=True))
    assert all(torch.equal(before[name], weight) and weight.grad is None for name, weight in model.named_parameters())
    ids = texts[0][:1, :20]
    plain, learnt = (decoding.mtp_heads(h, adaptive=False) for h in (made(model, 2), heads))
    for decoder in (plain, learnt):
        model.generate(ids, custom_generate=decoder, **GREEDY)
    assert learnt.statistics.calls < plain.statistics.calls


def test_a_loss_is_of_the_models_own_distribution():
    model = settled(llama())
    heads, ids = made(model, 2), prompt(2)
    with torch.no_grad():
        found, said = losses(heads, ids), model(ids, output_hidden_states=True)
        states = said.hidden_states[-1]
        for number in range(2):  # token n + number + 2 is what row n is about
            states = heads.rows(number, ids[:, number + 1 :], states[:, : 19 - number])
            logs = heads.logits(number, states).log_softmax(-1)
            want = -(said.logits[:, number + 1 :].softmax(-1) * logs).sum(-1).mean()
            torch.testing.assert_close(found[number], want)


def test_drawn_texts_have_the_models_distribution():
    model, ids = tiny(), torch.tensor([[1, 3, 1, 3, 1]])
    decoder = decoding.mtp_heads(made(model, 2), adaptive=False, generator=torch.Generator().manual_seed(0))
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 3}
    counts = drawn(model, ids, decoder, KVCache(model, 24, 50), 3000, 50, **how)
    with torch.no_grad():
        logits = model(followed(ids)).logits[:, 4:-1]
    assert chi_square(counts, of_every(logits)) < 1


def test_modules_are_saved(tmp_path):
    model = settled(llama())
    heads = made(model)
    heads.save(tmp_path)
    found = MTPHeads.load(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(heads.state_dict().values(), found.state_dict().values(), strict=True))
    with pytest.raises(DecodingError, match=r"width 48.* and this one has 16 and 6"):
        MTPHeads.load(tmp_path, tiny())
    with pytest.raises(DecodingError, match=r"holds no saved modules.*MTPHeads\.save"):
        MTPHeads.load(tmp_path / "nowhere", model)
    (tmp_path / "mtp_heads.json").write_text("{}")
    with pytest.raises(DecodingError, match="of format None"):
        MTPHeads.load(tmp_path, model)


def test_refused():
    model = settled(llama())
    heads = made(model)
    for run, why in (
        (lambda: MTPHeads(model, 0), "depth=0"),
        (lambda: MTPHeads(torch.nn.Linear(2, 2)), r"Linear has no model\.layers"),
        (lambda: decoding.mtp_heads(heads, "Mmmmm"), "at most 3 times m.*'Mmmm'"),
        (lambda: decoding.mtp_heads(heads, "mM"), "schedule 'mM'"),
        (lambda: decoding.mtp_heads(heads, begin="Mx"), "schedule 'Mx'"),
        (lambda: distil(heads, []), "0 batches"),
        (lambda: distil(heads, [prompt()[:, :4]]), "at least 5 tokens for 3 modules"),
        (lambda: distil(heads, [prompt()], 8, 1e30), "use a smaller rate"),
    ):
        with pytest.raises(DecodingError, match=why):
            run()
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(DecodingError, match=r"another LlamaForCausalLM.*MTPHeads\.load"):
        settled(llama()).generate(prompt(), custom_generate=decoding.mtp_heads(heads), **GREEDY)
    with pytest.raises(DecodingError, match=r"call heads\.eval"):
        model.generate(prompt(), custom_generate=decoding.mtp_heads(heads.train()), **GREEDY)
    assert unverified is not None
