"""Generating with a package: against the same passes under torch.compile, and without compiler, Dynamo and transformers."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelpass
from accelpass import PackageError
from accelpass.backends.package.decoder import PackagedDecoder
from accelpass.backends.package.sampling import Sampling
from tests.package.conftest import Packaged
from tests.package.decoding import CAPACITY, PASSES, answer, logits, prompts
from tests.small_models import relative_error


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (2, 7), (2, 13)])
def test_logits_and_answers_of_other_prompts(decoder: Packaged, batch: int, tokens: int) -> None:
    """A batch smaller than the package's, too, and a prompt of one token, which has no prompt's graph."""
    package, ids = accelpass.open(decoder.path), prompts(batch, tokens, tokens)
    want = logits(decoder.model, PASSES, ids, 6)
    session = package.session()
    got = [session.prompt(ids), *(session.step(one.argmax(-1)) for one in want[:-1])]
    assert max(map(relative_error, got, want)) < 0.02
    assert session.tokens == tokens + 5
    # The answer is that of the package's own logits, which ties in bfloat16 may part from the oracle's.
    assert torch.equal(package.generate(ids, 1)[:, tokens:], answer(got[:1]))


def test_generating_goes_on_from_its_own_tokens(decoder: Packaged) -> None:
    package, ids = accelpass.open(decoder.path), prompts(2, 5)
    made = package.generate(ids, 8)
    assert made.shape == (2, 13) and torch.equal(made[:, :5], ids)
    session = package.session()
    step = session.prompt(ids)
    for column in range(5, 13):
        assert torch.equal(made[:, column], step.argmax(-1))
        step = session.step(made[:, column])
    # What one answer has left behind is in no later one.
    assert torch.equal(package.generate(ids, 8), made)
    assert torch.equal(package.generate(ids[:1], 8), made[:1])


def test_streams_streamers_and_ends(decoder: Packaged) -> None:
    package, ids = accelpass.open(decoder.path), prompts(1, 4)
    made = package.generate(ids, 6)[0, 4:].tolist()
    assert [int(t) for t in package.stream(ids, 6)] == made
    heard: list[list[int]] = []

    class Streamer:
        def put(self, tokens: torch.Tensor) -> None:
            heard.append(tokens.flatten().tolist())

        def end(self) -> None:
            heard.append([])

    package.generate(ids, 6, streamer=Streamer())
    assert heard == [ids[0].tolist(), *([token] for token in made), []]
    first = made.index(made[3])
    assert package.generate(ids, 6, eos_token_id=made[3])[0, 4:].tolist() == made[: first + 1]
    # Of two sequences one ends early and goes on with the padding token of the model's settings.
    both = torch.cat([ids, prompts(1, 4, 9)])
    free = package.generate(both, 6)[:, 4:]
    ended = package.generate(both, 6, eos_token_id=[int(free[0, 0])])[:, 4:]
    assert ended[0, 1:].tolist() == [0] * (ended.shape[1] - 1)


def test_sampling_is_seeded_and_leaves_out_the_unlikely(decoder: Packaged) -> None:
    package, ids = accelpass.open(decoder.path), prompts(1, 4)
    drawn = [package.generate(ids, 8, do_sample=True, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(package.generate(ids, 8, do_sample=True, top_k=1, seed=3), package.generate(ids, 8))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(0, 9), st.floats(0.05, 1.0))
def test_top_k_and_top_p_against_transformers(seed: int, top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 3
    want = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    want = TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    assert torch.equal(Sampling(True, 1.0, top_k, top_p).kept(scores), want)


def test_threads_give_the_answers_of_one(decoder: Packaged) -> None:
    package = accelpass.open(decoder.path, threads=3)
    asked = [(prompts(1 + n % 2, 2 + n % 9, n), 3 + n % 8) for n in range(40)]
    alone = [package.generate(ids, new) for ids, new in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: package.generate(*one), asked))
    assert all(map(torch.equal, alone, together))


def test_nothing_that_compiles_is_imported(decoder: Packaged) -> None:
    program = f"""
import sys, torch, accelpass
package = accelpass.open({str(decoder.path)!r})
print(package.generate(torch.tensor([[5, 6, 7]]), 5).tolist())
odd = [m for m in sys.modules if m.partition(".")[0] in ("transformers", "triton", "jinja2", "networkx")]
print([m for m in sys.modules if m in ("torch._dynamo", "torch._inductor", "accelpass.passes")] + odd)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    made, imported = done.stdout.splitlines()
    assert made == str(accelpass.open(decoder.path).generate(torch.tensor([[5, 6, 7]]), 5).tolist())
    assert imported == "[]"


def test_the_tokenizer_comes_along(decoder: Packaged, mlp: Packaged) -> None:
    package = accelpass.open(decoder.path)
    ids = torch.tensor([package.tokenizer.encode("7 99 3").ids])
    assert ids.tolist() == [[7, 99, 3]]
    answer = package.generate(ids, 4)[0].tolist()
    assert package.tokenizer.decode(answer) == " ".join(map(str, answer))
    with pytest.raises(PackageError, match="the package has no tokenizer; package the model with tokenizer="):
        PackagedDecoder(package.manifest, package.graphs).tokenizer  # noqa: B018


def test_weights_are_in_the_file_once(decoder: Packaged) -> None:
    """Both graphs read the same packed tensors: the file holds what the model has, in a quarter of the bytes."""
    manifest = accelpass.open(decoder.path).manifest
    prompt, decode = (set(manifest.graphs[name].constants.values()) for name in ("prompt", "decode"))
    packed = {name for name, weight in manifest.weights.items() if weight.dtype == "int8"}
    assert packed and packed <= prompt & decode
    assert decoder.report.weights_after < decoder.report.weights_before / 2


@pytest.mark.parametrize(
    ("ids", "settings_", "said"),
    [
        (prompts(1, CAPACITY + 1), {}, f"a prompt of {CAPACITY + 1} tokens does not fit into a package for {CAPACITY}"),
        (prompts(3, 4), {}, "3 prompts; the package was compiled for 2 at once"),
        (prompts(1, 4), {"max_new_tokens": CAPACITY}, f"at most {CAPACITY - 3} here"),
        (prompts(1, 4), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (prompts(1, 4)[0], {}, r"int64 \(4,\); a package takes int64 \(batch, tokens\)"),
        (prompts(1, 4).int(), {}, "input_ids is int32"),
        (prompts(1, 4)[:, :0], {}, "at least one of each"),
        (prompts(1, 4), {"do_sample": True, "temperature": 0.0}, "temperature=0.0; it is above 0"),
        (prompts(1, 4), {"do_sample": True, "top_p": 0.0}, "top_p in"),
    ],
)
def test_calls_that_do_not_fit(decoder: Packaged, ids: torch.Tensor, settings_: dict, said: str) -> None:
    with pytest.raises(PackageError, match=said):
        accelpass.open(decoder.path).generate(ids, **settings_)


def test_a_session_that_is_full_or_over(decoder: Packaged) -> None:
    package = accelpass.open(decoder.path)
    session = package.session()
    session.prompt(prompts(1, CAPACITY))
    with pytest.raises(PackageError, match=f"room for {CAPACITY} tokens, and they are used"):
        session.step(torch.tensor([1]))
    with pytest.raises(PackageError, match=f"holds {CAPACITY} tokens; begin another"):
        session.prompt(prompts(1, 2))
    session.close()
    with pytest.raises(PackageError, match="this session is closed"):
        package.graphs and session._run("decode", prompts(1, 1))
    assert package.generate(prompts(1, CAPACITY)).shape == (1, CAPACITY + 1)


def test_tokens_that_the_model_does_not_know(decoder: Packaged) -> None:
    """Compiled code would look them up all the same, and the process end."""
    package = accelpass.open(decoder.path)
    for odd in (-1, 128):
        with pytest.raises(PackageError, match=f"token {odd}; the model knows 0 to 127"):
            package.generate(torch.tensor([[5, odd, 6]]), 2)
    session = package.session()
    session.prompt(prompts(1, 3))
    with pytest.raises(PackageError, match="token 500"):
        session.step(torch.tensor([500]))
