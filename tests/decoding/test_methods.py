"""What single ways of guessing do, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import accelpass
from accelpass import KVCache, decoding
from accelpass.decoding import Approval, DecodingError, PromptLookup, Request, TokenRecycling
from accelpass.decoding.pace import Pace
from tests.decoding.test_exact import GREEDY, near, prompt
from tests.passes.test_kv_methods import llama
from tests.public.test_kv_cache import settled
from tests.sweep import examples


def looked_up(text: list[int], most: int, **how: int) -> list[int] | None:
    """The oracle: the latest earlier place of the longest end of the text, and what follows it, read again past the text's end."""
    for length in range(how["longest"], how["shortest"] - 1, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if length <= len(text) and text[end + 1 - length : end + 1] == text[-length:]:
                guesses = list(text)
                for _ in range(most):
                    guesses.append(guesses[end + 1 + len(guesses) - len(text)])
                return guesses[len(text) :]
    return None


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_what_is_looked_up(text, most, shortest, more):
    how = {"longest": shortest + more, "shortest": shortest}
    drafter = PromptLookup(**how).start(Request(None, torch.tensor([text]), None, None, 99))
    for end in range(1, len(text) + 1):  # it remembers, and is asked at each length
        got = drafter.propose([text[:end]], most)
        assert (None if got is None else got.tokens[0].tolist()) == looked_up(text[:end], most, **how)


def test_a_size_that_pays_again_is_not_left_to_rest():
    """Guesses that were bad for long become good: a try that pays is followed by another at once, until the mean says so, too."""
    pace = Pace((1, 4))
    for _ in range(3):
        pace.note(1, 1, 1.0)
    while not pace.allowed(9) or pace._of(4).wait < 64:  # learns that they do not pay
        pace.note(4 if pace.allowed(9) else 1, 1, 1.5 if pace.allowed(9) else 1.0)
    singles = tries = 0
    while pace._of(4).rate < 1.5:
        if pace.allowed(9):
            pace.note(4, 3, 1.5)
            tries += 1
        else:
            pace.note(1, 1, 1.0)
            singles += 1
    assert singles < 130 and 1 < tries < 10 and pace.allowed(9)
    pace.note(4, 1, 1.5)  # one bad call does not end it
    assert pace.allowed(9)


def test_sizes_rest_where_guesses_do_not_pay():
    pace = Pace((1, 4))
    assert pace.allowed(9) == []  # nothing to compare with
    for _ in range(2):
        pace.note(1, 1, 1.0)
    tried = 0
    for _ in range(1000):
        if pace.allowed(9):
            tried += 1
            pace.note(4, 1, 1.5)
        else:
            pace.note(1, 1, 1.0)
    assert 3 < tried < 20
    for _ in range(200):  # and come back where they do
        sizes = pace.allowed(9)
        pace.note(sizes[-1] if sizes else 1, 3 if sizes else 1, 1.5 if sizes else 1.0)
    assert pace.allowed(9) == [4]
    assert pace.allowed(3) == []


def test_what_a_costly_guess_has_lost_is_paid_off_before_the_next():
    """A draft that reads a long text for its first guess, and guesses wrong."""
    pace, seconds, tokens = Pace((1, 4, 8)), 0.0, 0
    while tokens < 3000:
        sizes = pace.allowed(9)
        size, took = (max(sizes), 40.0 if tokens % 200 < 100 else 6.0) if sizes else (1, 1.0)
        pace.note(size, 1, took)
        seconds, tokens = seconds + took, tokens + 1
    first = 2 * 40 + 2 * 40  # sizes 8 and 4: one call that is not counted, and one that tells
    assert seconds < 1.06 * tokens + first


def student_and_teacher(seed: int, size: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (torch.randn(size) * 2).softmax(-1), (torch.randn(size) * 2).softmax(-1)


@settings(max_examples=examples(4), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.1, 2.0]), st.integers(1, 6))
def test_approved_tokens_have_the_distribution_of_the_card(seed, threshold, trials):
    q, p = student_and_teacher(seed)
    match = torch.rand(30) > 0.2
    approval, draws = Approval(threshold, 20, trials, match), 20_000
    got = approval.approved(p.expand(draws, -1), q.expand(draws, -1), torch.Generator().manual_seed(1))
    teacher, student = torch.zeros(30), torch.zeros(30)
    values, ids = p.topk(20)
    teacher[ids[match[ids]]] = values[match[ids]] / values[match[ids]].sum()
    values, ids = q.topk(20)
    student[ids] = values / values.sum()
    allowed = torch.zeros(30, dtype=torch.bool)
    allowed[ids] = values >= threshold
    accepted = (teacher * allowed).sum()
    missed = (1 - accepted) ** trials
    want = teacher * allowed / accepted.clamp_min(1e-12) * (1 - missed) + missed * student
    assert (torch.bincount(got[:, 0], minlength=30) / draws - want).abs().max() < 0.02
    assert student[got[:, 0]].min() > 0


def test_a_student_writes_with_its_teacher():
    """Every token is among the student's likeliest, one call of each model a token."""
    student, teacher = settled(llama()), near(None)
    for threshold in (0.01, 2.0):
        decoder = decoding.rsd(teacher, threshold, generator=torch.Generator().manual_seed(0))
        got = student.generate(
            prompt(2),
            past_key_values=KVCache(student, 48, 2),
            custom_generate=decoder,
            do_sample=True,
            max_new_tokens=9,
            attention_mask=torch.ones(2, 20, dtype=torch.int64),
        )
        assert got.shape == (2, 29)
        assert decoder.statistics.calls == 8
        with torch.no_grad():
            probs = student(got).logits[:, 19:-1].softmax(-1)
        chosen = probs.gather(-1, got[:, 20:, None])
        assert (chosen >= probs.topk(20, -1).values[..., -1:] - 1e-6).all()
    with pytest.raises(DecodingError, match=r"rsd\(teacher\)"):
        student.generate(prompt(), custom_generate=decoding.Decoder(PromptLookup(), Approval()), **GREEDY)


def test_successors_are_saved(tmp_path):
    model = settled(llama())
    memory = TokenRecycling(6)
    with pytest.raises(DecodingError, match="nothing to save"):
        memory.save(tmp_path)
    model.generate(prompt(), custom_generate=decoding.token_recycling(memory=memory, adaptive=False), **GREEDY)
    memory.save(tmp_path)
    found = TokenRecycling.load(tmp_path)
    assert memory.matrix is not None and found.matrix is not None
    assert torch.equal(found.matrix, memory.matrix) and memory.matrix.any() and found.nodes == 6
    again = decoding.token_recycling(memory=found, adaptive=False)
    assert torch.equal(model.generate(prompt(), custom_generate=again, **GREEDY), model.generate(prompt(), **GREEDY))
    with pytest.raises(DecodingError, match=r"holds no saved successors.*TokenRecycling\.save"):
        TokenRecycling.load(tmp_path / "nowhere")


def test_successors_are_what_was_said_last():
    """The card's step 6, for a request without guesses."""
    model = settled(llama())
    memory = TokenRecycling(6)
    text = model.generate(prompt(), custom_generate=decoding.token_recycling(memory=memory, sizes=(1,)), **GREEDY)
    with torch.no_grad():
        logits = model(text).logits[0]
    assert memory.matrix is not None
    want = torch.zeros_like(memory.matrix)
    for place in range(19, 38):  # the token after the last row is never looked at
        want[text[0, place]] = logits[place].topk(8).indices.int()
    assert torch.equal(memory.matrix, want)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams=2: a beam search .* use num_beams=1"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores.*leave them out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests(name):
    more, why = REFUSED[name]
    with pytest.raises(DecodingError, match=why):
        settled(llama()).generate(prompt(), custom_generate=decoding.prompt_lookup(), **GREEDY, **more)


def test_refused_parts():
    model = settled(llama())
    other = llama()
    other.config.vocab_size = 95
    with pytest.raises(DecodingError, match=r"vocabulary of 95 tokens and the model one of 96.*own tokenizer"):
        model.generate(prompt(), custom_generate=decoding.draft_model(other), **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=48)
    with pytest.raises(DecodingError, match=r"StaticCache gives no tokens back.*KVCache"):
        model.generate(prompt(), past_key_values=cache, custom_generate=decoding.prompt_lookup(), **GREEDY)
    memory = TokenRecycling(matrix=torch.zeros(95, 8, dtype=torch.int32))
    with pytest.raises(DecodingError, match="vocabulary of 95"):
        model.generate(prompt(), custom_generate=decoding.token_recycling(memory=memory), **GREEDY)
    for wrong in (
        lambda: TokenRecycling(81),
        lambda: PromptLookup(1, 2),
        lambda: decoding.prompt_lookup(sizes=()),
        lambda: decoding.Jacobi("zeros"),
        lambda: Approval(trials=0),
    ):
        with pytest.raises(DecodingError):
            wrong()
    assert issubclass(DecodingError, accelpass.AccelpassError)


def test_models_that_read_in_both_directions_are_refused():
    from transformers import BertConfig, BertForMaskedLM

    model = settled(llama())
    model.config.is_causal = False
    with pytest.raises(DecodingError, match=r"reads a text in both directions.*use accelpass\.decoding\.dparallel"):
        model.generate(prompt(), custom_generate=decoding.jacobi(4), **GREEDY)
    bert = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(DecodingError, match="BertForMaskedLM is no causal decoder"):
        next(decoding.prompt_lookup().steps(bert, prompt(), DynamicCache(), 4))


def test_a_tree_has_to_fit_a_call():
    """The paper's tree is cut to a call's rows, with the parents of all that is left; a tree of one's own that is too large is refused."""
    model = settled(llama())
    want = model.generate(prompt(), **GREEDY)
    decoder = decoding.token_recycling(80, sizes=(1, 6), adaptive=False)
    for _ in range(2):
        got = model.generate(prompt(), past_key_values=KVCache(model, 64), custom_generate=decoder, **GREEDY)
        assert torch.equal(got, want)
    assert decoder.statistics.rows.get(6)

    class Large(decoding.Proposer):
        def start(self, request):
            class Guess(decoding.Drafter):
                def propose(self, text, most):
                    return decoding.Proposal(torch.zeros((1, 7), dtype=torch.int64), tree=TokenRecycling(7).tree(7))

            return Guess()

    with pytest.raises(
        DecodingError, match="a tree of 7 guesses where a call has room for 3: give the decoder a size of 8"
    ):
        model.generate(prompt(), custom_generate=decoding.Decoder(Large(), sizes=(1, 4), adaptive=False), **GREEDY)
