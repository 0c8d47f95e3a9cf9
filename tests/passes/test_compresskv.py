"""CompressKV: retrieval heads and layer budgets from calibration, and what they keep, against an oracle written from its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.ir.attention.spec.spec import LastQueries
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.kv.banks import Floats
from accelpass.passes.core.plan import Plan
from accelpass.passes.kv_cache.learnt.compresskv import CompressKV, HeadsMass, OneChoice, artefact, layer_budgets
from accelpass.passes.kv_cache.learnt.retrieval import needle_of
from tests.passes.kv_truth import Dense, Oracle, assisted_like_plain, attending, fed, mixed, probabilities
from tests.passes.test_kv_methods import CAPACITY, VOCABULARY, llama, tokens
from tests.passes.test_kv_storage import Layer
from tests.sweep import examples, sweep

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def srh_keep(q: Tensor, k: Tensor, heads: tuple[int, ...], budget: int, w: int, ker: int, scale: float) -> Tensor:
    """The card's; ``q`` of the whole prompt."""
    batch, heads_all, tokens, _ = q.shape
    group = heads_all // k.shape[1]
    if tokens <= budget:
        return torch.arange(tokens).expand(batch, tokens)
    s: Any = 0
    for h in heads:
        x = (q[:, h, tokens - w :] @ k[:, h // group].transpose(-1, -2)).float() * scale
        i = torch.arange(tokens - w, tokens)[:, None]
        x = x.masked_fill(torch.arange(tokens)[None] > i, float("-inf"))
        s = s + F.avg_pool1d(x.softmax(-1).sum(1)[:, None, : tokens - w], ker, 1, ker // 2)[:, 0]
    index = (s / len(heads)).topk(budget - w, -1).indices.sort(-1).values
    return torch.cat([index, torch.arange(tokens - w, tokens).expand(batch, w)], -1)


class Compress(Oracle):
    """Prompts are dense; of them ``srh_keep`` stays, and all that comes after."""

    def __init__(self, heads: tuple[int, ...], budgets: list[int], w: int, ker: int = 5) -> None:
        super().__init__()
        self.heads, self.budgets, self.w, self.ker = heads, budgets, w, ker

    def attend(self, layer, q, k, v, scale, mask, index):
        new = q.shape[2]
        if "kept" not in layer:
            kept = srh_keep(q, k, self.heads, self.budgets[index], self.w, self.ker, scale)
            layer["kept"] = torch.zeros(len(k), k.shape[2], dtype=torch.bool).scatter(1, kept, True)
            return mixed(probabilities(q, k, scale, mask), v)
        layer["kept"] = F.pad(layer["kept"], (0, new), value=True)
        causal = torch.ones(new, k.shape[2], dtype=torch.bool).tril(k.shape[2] - new)
        return mixed(probabilities(q, k, scale, layer["kept"][:, None, None] & causal), v)


@settings(max_examples=examples(12), deadline=None)
@given(
    st.integers(1, 2), st.sampled_from([1, 2, 4]), st.integers(3, 40), st.integers(5, 24), st.integers(1, 4),
    st.sampled_from([1, 3, 5]), st.integers(0, 2**31),
)  # fmt: skip
def test_it_keeps_what_the_card_keeps(batch, groups, prompt, budget, w, kernel, seed):
    draw = torch.Generator().manual_seed(seed)
    heads = tuple(torch.randperm(2 * groups, generator=draw)[: max(1, groups)].tolist())
    store = OneChoice(budget - w, w, score=LastQueries(HeadsMass(heads), w), kernel=kernel, answer=12)
    layer, held = Layer(store, Floats(), batch, groups, 16, prompt + 12, seed), dict[str, Any]()
    oracle = Compress(heads, [budget], w, kernel)
    for count in (prompt, 1, 1, 1, 1):
        q, out = layer.feed(count)
        assert torch.allclose(out, oracle.attend(held, q, layer.k, layer.v, layer.scale, None, 0), atol=2e-4)
        at = layer.held["positions"]
        stored = [sorted(p[p >= 0].tolist()) for p in at.flatten(0, 1)]
        assert stored == [row.nonzero()[:, 0].tolist() for row in held["kept"] for _ in range(2)]


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 300))
def test_layer_budgets(error, mean):
    least, most = min(32, mean), 3 * mean
    made = layer_budgets(error, mean, least, most)
    assert sum(made) == mean * len(error) and all(least <= one <= most for one in made)
    total = sum(error)
    exact = [least + e / total * (mean - least) * len(error) for e in error] if total else []
    if exact and all(least <= e <= most - 1 for e in exact):
        assert all(abs(a - b) <= 1 + len(error) / 2 for a, b in zip(made, exact, strict=True))
    assert all(a >= b - 1 for a, x in zip(made, error, strict=True) for b, y in zip(made, error, strict=True) if x > y)


def plan_of(model: Any, options: dict[str, Any], heads: list[int], errors: tuple[float, float] = (0.75, 0.25)) -> Plan:
    made = {artefact(path, "heads"): torch.tensor(heads) for path in LAYERS}
    made |= {artefact(p, "error"): torch.tensor(e, dtype=torch.float64) for p, e in zip(LAYERS, errors, strict=True)}
    return Plan.of(model, [{"name": "compresskv", **options}], made)


def compiled(model: Any, plan: Plan | None = None, *passes: Any, lowering: str = "eager") -> Any:
    options = {"lowering": lowering, "passes": list(passes)} if plan is None else {"lowering": lowering, "plan": plan}
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options=options, fullgraph=True)


@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_in_a_model(lowering):
    """Layers of unlike budgets, with padding on the left: as without it."""
    model, pieces = llama(), tokens(2, 24, *[1] * 5)
    plan = plan_of(model, {"tokens": 9, "window": 3, "retrieval": 2}, [1, 2, 0, 3])
    got = fed(compiled(model, plan, lowering=lowering), KVCache(model, CAPACITY, 2), pieces)
    with attending(model, Compress((1, 2), [9, 9], 3)) as dense:  # 9 tokens are fewer than a layer's least
        want = fed(model, dense, pieces)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


def test_layers_differ_by_their_error_and_the_cache_is_smaller():
    model = llama()
    plan = plan_of(model, {"tokens": 40, "window": 4, "answer": 8}, [3, 2, 1, 0])
    cache = KVCache(model, 128, 1)
    fed(compiled(model, plan), cache, tokens(1, 90, 1, 1))
    held = [int((t >= 0).sum(-1).unique()) for _, name, t in cache.buffers() if name.endswith("positions")]
    assert held == [44 + 2, 36 + 2]  # of 16 tokens beyond the least 32 each, three quarters and one; and the answer
    assert cache.nbytes() < 0.6 * cache.dense_nbytes()


@pytest.mark.slow
def test_padding_gets_nothing():
    model, pieces, plain = llama(), tokens(2, 20, 1, 1, 1), tokens(2, 20, 1, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :6] = 0
    plan = plan_of(model, {"tokens": 8, "window": 3}, [0, 1, 2, 3])
    fast = compiled(model, plan)
    got = fed(fast, KVCache(model, CAPACITY, 2), pieces, padding)[:, 0]
    alone = [plain[0][:1, 6:], *(p[:1] for p in plain[1:])]
    want = fed(fast, KVCache(model, CAPACITY, 1), alone)[:, 0]
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    sweep({"tokens": None, "budget": 1.0}, {"tokens": CAPACITY}, {"tokens": None, "budget": 1.0, "heads": "adaptive"}),
)
def test_equals_dense_where_it_must(options):
    model, pieces = llama(), tokens(2, 15, 1, 1, 8, 1, 1)
    got = fed(compiled(model, plan_of(model, options, [0, 1, 2, 3])), KVCache(model, CAPACITY, 2), pieces)
    with attending(model, Dense()) as dense:
        want = fed(model, dense, pieces)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.slow
def test_two_prompts_and_an_assistant():
    """Candidates that are rejected leave no trace: with guesses the answer is the same."""
    model = llama()
    plan = plan_of(model, {"tokens": 10, "window": 3, "answer": 4}, [2, 1, 3, 0])
    assert assisted_like_plain(model, plan=plan)


# What calibration finds


def texts(count: int = 2, prompt: int = 44, marked: bool = True) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (1, prompt + 6), generator=draw)
        ids[:, prompt:] = ids[:, 9:15]
        labels = ids.clone()
        labels[:, :prompt] = -100
        needle = torch.zeros_like(ids, dtype=torch.bool)
        needle[:, 9:15] = True
        made.append({"input_ids": ids, "labels": labels, **({"needle": needle} if marked else {})})
    return made


class Watched(Oracle):
    """The mass of each query head on a span, of the last queries."""

    def __init__(self) -> None:
        super().__init__()
        self.mass: dict[int, Tensor] = {}

    def attend(self, layer, q, k, v, scale, mask, index):
        p = probabilities(q, k, scale, mask)
        self.mass[index] = self.mass.get(index, 0) + p.flatten(1, 2)[0, :, 44:49, 9:15].sum((1, 2))
        return mixed(p, v)


def found_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model finds nothing."""
    monkeypatch.setattr("accelpass.passes.kv_cache.learnt.retrieval.FOUND", -1.0)


@pytest.mark.slow
def test_heads_are_ranked_by_their_attention_to_the_needle(monkeypatch, tmp_path):
    found_always(monkeypatch)
    model, data = llama(), texts()
    plan = accelpass.calibrate(model, data, [{"name": "compresskv", "tokens": 36}], progress=False)
    plan.save(tmp_path / "compress.json")
    plan = Plan.load(tmp_path / "compress.json")
    oracle = Watched()
    with attending(model, oracle), torch.no_grad():
        for one in data:
            model(one["input_ids"], use_cache=False)
    for index, path in enumerate(LAYERS):
        assert plan.tensors[artefact(path, "heads")].tolist() == oracle.mass[index].argsort(descending=True).tolist()
    assert sum(float(plan.tensors[artefact(path, "error")]) for path in LAYERS) == pytest.approx(1)
    unmarked = accelpass.calibrate(model, texts(marked=False), [{"name": "compresskv"}], progress=False)
    assert all(torch.equal(plan.tensors[name], t) for name, t in unmarked.tensors.items())
    fed(compiled(model, plan), KVCache(model, 64), tokens(1, 40, 1))


def test_the_error_is_that_of_keeping_few(monkeypatch):
    """Against the model itself with the oracle's cache of 32 tokens, token by token, watched after its output projection."""
    found_always(monkeypatch)
    model, (text,) = llama(), texts(1)
    plan = accelpass.calibrate(model, [text], [{"name": "compresskv", "retrieval": 2}], progress=False)
    outs: list[list[Tensor]] = [[], []]
    for index in (0, 1):
        projection = model.model.layers[index].self_attn.o_proj
        projection.register_forward_hook(lambda _, x, out, index=index: outs[index].append(out.detach()))
    pieces = [text["input_ids"][:, :44], *text["input_ids"][:, 44:49].split(1, 1)]
    ranked = [tuple(plan.tensors[artefact(path, "heads")][:2].tolist()) for path in LAYERS]
    runs = []
    for budget in (1000, 32):
        for seen in outs:
            seen.clear()
        oracle = Compress((), [budget] * 2, 8)
        attend = oracle.attend

        def of_layer(layer, q, k, v, scale, mask, index, oracle=oracle, attend=attend):
            oracle.heads = ranked[index]
            return attend(layer, q, k, v, scale, mask, index)

        oracle.attend = of_layer  # type: ignore[method-assign]
        with attending(model, oracle) as cache:
            fed(model, cache, pieces)
        runs.append([torch.cat(seen[1:], 1)[0] for seen in outs])
    lost = [float(((b - a).norm(dim=-1) / (a.norm(dim=-1) + 1e-5)).sum()) for a, b in zip(*runs, strict=True)]
    for path, want in zip(LAYERS, lost, strict=True):
        assert float(plan.tensors[artefact(path, "error")]) == pytest.approx(want / sum(lost), rel=1e-3)


def test_a_needle_that_is_not_given():
    ids = torch.tensor([[5, 1, 2, 3, 9, 1, 2, 8, 2, 3, 9]])
    labels = torch.tensor([[-100] * 8 + [2, 3, 9]])
    assert needle_of({"input_ids": ids, "labels": labels})[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    other = torch.tensor([[-100] * 8 + [7, 7, 6]])
    assert not needle_of({"input_ids": ids, "labels": other}).any()


def test_texts_that_tell_nothing():
    with pytest.raises(PassError, match=r"none of 2 texts tells retrieval heads.*in 0"):
        accelpass.calibrate(llama(), texts(), ["compresskv"], progress=False)


def test_a_model_that_is_not_finite(monkeypatch):
    found_always(monkeypatch)
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(PassError, match=r"layers\.1\.self_attn: its attention is not finite"):
        accelpass.calibrate(model, texts(), ["compresskv"], progress=False)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 8}, "more than the 8 newest"),
        ({"tokens": 100, "recent": 1.0}, "more than the 100 newest"),
        ({"retrieval": 0}, "1 head or more"),
        ({"ranking": (1, 1)}, "each once"),
        ({"ranking": (-1,)}, "each once"),
        ({"kernel": 4}, "an odd number"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(OptionError, match=said):
        CompressKV(**options)


def test_without_a_plan():
    with pytest.raises(Exception, match="compresskv needs retrieval heads"):
        fed(compiled(llama(), None, "compresskv"), KVCache(llama(), CAPACITY), tokens(1, 9))


@pytest.mark.slow
def test_heads_by_hand():
    model, pieces = llama(), tokens(1, 20, 1, 1)
    by_hand = {"name": "compresskv", "tokens": 9, "window": 3, "ranking": (3, 0)}
    got = fed(compiled(model, None, by_hand), KVCache(model, CAPACITY), pieces)
    with attending(model, Compress((3, 0), [9, 9], 3)) as dense:
        assert torch.allclose(got, fed(model, dense, pieces), atol=1e-4)
    with pytest.raises(Exception, match="query heads below 4"):
        fed(compiled(model, None, {**by_hand, "ranking": (4,)}), KVCache(model, CAPACITY), pieces)


def test_a_plan_of_another_model():
    model, other = llama(), llama(groups=1)
    plan = plan_of(model, {}, [0, 1, 2, 3])
    with pytest.raises(Exception, match="belongs to another model"):
        fed(compiled(other, plan), KVCache(other, CAPACITY), tokens(1, 9))
    plan = plan_of(model, {}, [0, 1, 2])
    with pytest.raises(Exception, match="ranks 3 heads"):
        fed(compiled(model, plan), KVCache(model, CAPACITY), tokens(1, 9))


def test_a_layer_that_no_calibration_saw():
    model = llama()
    plan = plan_of(model, {"tokens": 12}, [0, 1, 2, 3])
    for part in ("heads", "error"):
        del plan.tensors[artefact(LAYERS[1], part)]
    fast = compiled(model, plan)
    fed(fast, KVCache(model, CAPACITY), tokens(1, 20, 1))
    assert "no calibration saw its heads" in str(accelpass.explain(fast))
