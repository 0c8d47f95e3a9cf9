"""Rules of acceptance against their oracles, and drawn texts against the distribution that they must have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from accelpass import KVCache, decoding
from accelpass.decoding import Proposal, Request, exact
from accelpass.decoding.recycling import CHILDREN
from accelpass.decoding.tree import Tree, named
from tests.sweep import examples, quick


def asked(ids: torch.Tensor, **more: Any) -> Request:
    return Request(None, ids, None, None, 99, **more)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 5))
def test_greedy_acceptance(seed, batch, guesses):
    """The oracle walks along each chain."""
    torch.manual_seed(seed)
    read, logits = torch.randint(0, 3, (batch, guesses + 1)), torch.randn(batch, guesses + 1, 3)
    got = exact(read, logits, Proposal(read[:, 1:]), asked(read))
    for line, said, count, tokens in zip(read, logits.argmax(-1), got.counts, got.tokens, strict=True):
        n = 0
        while n < guesses and line[n + 1] == said[n]:
            n += 1
        assert n == count
        assert torch.equal(tokens[: n + 1], said[: n + 1])


def small_tree(nodes: int) -> Tree:
    return decoding.TokenRecycling(nodes).tree(nodes)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80))
def test_acceptance_of_a_tree(seed, nodes):
    """The card's step: of each path from the root to a leaf, the longest run that agrees; the first path of the longest."""
    torch.manual_seed(seed)
    tree = small_tree(nodes)
    read, logits = torch.randint(0, 3, (1, nodes + 1)), torch.randn(1, nodes + 1, 3)
    said = logits.argmax(-1)[0].tolist()
    parents = [0, *tree.parents.tolist()]
    leaves = [n for n in range(nodes + 1) if n not in parents[1:]]

    def path(node: int) -> list[int]:
        return [0] if node == 0 else [*path(parents[node]), node]

    def run(nodes: list[int]) -> int:
        k = 0
        while k + 1 < len(nodes) and read[0, nodes[k + 1]] == said[nodes[k]]:
            k += 1
        return k

    most = max(run(path(leaf)) for leaf in leaves)
    got = exact(read, logits, Proposal(read[:, 1:], tree=tree), asked(read))
    assert got.counts.tolist() == [most]
    assert got.rows is not None
    rows = got.rows[0, : most + 1].tolist()
    assert any(path(leaf)[: most + 1] == rows and run(path(leaf)) == most for leaf in leaves)
    assert got.tokens[0, : most + 1].tolist() == [said[row] for row in rows]


def test_the_papers_tree():
    tree = small_tree(80)
    assert torch.bincount(tree.depths).tolist() == [1, 8, 21, 25, 15, 8, 3]
    assert tree.ancestors.sum(-1).equal(tree.depths + 1)
    assert 81 - len(set(tree.parents.tolist())) == 40  # leaves
    assert sorted(named(CHILDREN)) == sorted(
        tuple(r for r in path) for path in [(), *[_ranks(tree, n) for n in range(1, 81)]]
    )


def _ranks(tree: Tree, node: int) -> tuple[int, ...]:
    steps = [int(n) for n in tree.paths[node, 1 : int(tree.depths[node]) + 1]]
    return tuple(int(tree.ranks[n - 1]) for n in steps)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The statistic over its bound at 1 in 100,000 (Wilson and Hilferty); above 1 the distributions differ."""
    want = probs * counts.sum()
    cells = want > 5
    statistic = ((counts - want)[cells] ** 2 / want[cells]).sum()
    free = int(cells.sum()) - 1
    bound = free * (1 - 2 / (9 * free) + 4.27 * (2 / (9 * free)) ** 0.5) ** 3
    assert counts[~cells].sum() <= want[~cells].sum() + 5 * want[~cells].sum().sqrt() + 1
    return float(statistic / bound)


@pytest.mark.parametrize("drawn", [True, False])
def test_drawn_tokens_have_the_models_distribution(drawn):
    """20,000 draws of two tokens by speculative sampling, for guesses that were drawn and for others."""
    torch.manual_seed(0)
    draws, size = 20_000, 6
    p, q = (torch.randn(size, size) * 1.5).log_softmax(-1), (torch.randn(size) * 1.5).softmax(-1)
    guess = torch.multinomial(q, draws, True) if drawn else torch.full((draws,), 2)
    read = torch.stack([torch.zeros(draws, dtype=torch.int64), guess], 1)
    logits = p[read]  # the distribution after each token depends on it
    got = exact(
        read, logits, Proposal(guess[:, None], q.expand(draws, 1, size) if drawn else None),
        asked(read, samples=True, generator=torch.Generator().manual_seed(1)),
    )  # fmt: skip
    first = torch.bincount(got.tokens[:, 0], minlength=size)
    assert chi_square(first, p[0].exp()) < 1
    accepted = got.counts == 1
    assert torch.equal(got.tokens[accepted, 0], guess[accepted])
    follows = torch.bincount(got.tokens[accepted & (guess == 2), 1], minlength=size)
    assert chi_square(follows, p[2].exp()) < 1
    share = torch.minimum(p[0].exp(), q).sum() if drawn else p[0, 2].exp()
    assert abs(accepted.float().mean() - share) < 0.02


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.8, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


SAMPLERS = {
    "draft_model": lambda generator: decoding.draft_model(tiny(1), sizes=(1, 3), adaptive=False, generator=generator),
    "jacobi": lambda generator: decoding.jacobi(3, adaptive=False, generator=generator),
    "token_recycling": lambda generator: decoding.token_recycling(5, adaptive=False, generator=generator),
    "prompt_lookup": lambda generator: decoding.prompt_lookup(sizes=(1, 3), adaptive=False, generator=generator),
}


EVERY = torch.cartesian_prod(*[torch.arange(6)] * 3)
"""Every text of three tokens."""


def drawn(
    model: Any, prompt: torch.Tensor, decoder: Any, cache: KVCache, draws: int, batch: int, **how: Any
) -> torch.Tensor:
    """How often each text of three tokens is drawn after a prompt ``(1, tokens)``, ``(216,)``."""
    texts = []
    for _ in range(draws // batch):
        cache.reset()
        made = model.generate(prompt.expand(batch, -1), past_key_values=cache, custom_generate=decoder, **how)
        texts.append(made[:, prompt.shape[1] :])
    return torch.bincount(torch.cat(texts) @ torch.tensor([36, 6, 1]), minlength=216)


def followed(prompt: torch.Tensor) -> torch.Tensor:
    """The prompt with each of those texts."""
    return torch.cat([prompt.expand(len(EVERY), -1), EVERY], 1)


def of_every(logits: torch.Tensor) -> torch.Tensor:
    """The probability of each text, from logits ``(216, 3, 6)``."""
    return logits.softmax(-1).gather(-1, EVERY.unsqueeze(-1)).squeeze(-1).prod(-1)


@pytest.mark.parametrize("name", quick(list(SAMPLERS), "draft_model", "jacobi"))
def test_drawn_texts_have_the_models_distribution(name):
    """Texts of three tokens, through temperature and top-k, against their probabilities under the model."""
    model, prompt = tiny(), torch.tensor([[1, 3, 1, 3, 1]])
    draws, batch = (1500, 1) if name == "token_recycling" else (6000, 20)  # trees are for one text
    how = {"do_sample": True, "max_new_tokens": 3, "temperature": 1.3, "top_k": 4}
    decoder, cache = SAMPLERS[name](torch.Generator().manual_seed(3)), KVCache(model, 24, batch)
    counts = drawn(model, prompt, decoder, cache, draws, batch, **how)
    with torch.no_grad():
        logits = model(followed(prompt)).logits[:, 4:-1] / 1.3
    logits = logits.masked_fill(logits < logits.topk(4, -1).values[..., -1:], float("-inf"))
    assert chi_square(counts, of_every(logits)) < 1
