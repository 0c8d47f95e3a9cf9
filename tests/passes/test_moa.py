"""MoA and sink_window in whole models against the eager oracle, with a cache and without; plans; what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

import accelpass
from accelpass import KVCache
from accelpass.caches.kv_map import KEPT, kept
from accelpass.ir.errors import AccelpassError, OptionError, PassError
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from tests.passes import kv_truth
from tests.passes.kv_truth import attending, fed
from tests.passes.span_truth import Spans, moa_mask
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens
from tests.sweep import sweep

SMALL = {"block": 4, "sinks": 4, "reserve": 8}
RULES = {0: [(0.0, 0.25), (-4.0, 0.5)], 1: [(8.0, 0.0), (0.0, 1.0)]}
HALF = [(-4.0, 0.5)] * 2
PIECES = (21, *[1] * 6, 9, 1, 1, 1)


def plan_of(model: Any, rules: dict[int, list[tuple[float, float]]] = RULES, *others: Any, **options: Any) -> Plan:
    paths = {f"moa/rules/model.layers.{layer}.self_attn": of for layer, of in rules.items()}
    tensors = {path: torch.tensor(of, dtype=torch.float64) for path, of in paths.items()}
    return Plan.of(model, [{"name": "moa", **SMALL, **options}, *others], tensors)


def far(model: Any, oracle: kv_truth.Oracle, pieces: list[torch.Tensor], padding: Any = None, **options: Any) -> float:
    cache = KVCache(model, CAPACITY, pieces[0].shape[0])
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", **options}, fullgraph=True)
    got = fed(fast, cache, pieces, padding)
    with attending(model, oracle) as dense:
        want = fed(model, dense, pieces, padding)
    return float((got - want).abs().max() / want.abs().max())


def truth(rules: Any = RULES) -> Spans:
    return Spans(rules, 4, 4, 8, CAPACITY)


@pytest.mark.parametrize("lowering", sweep("eager", "aten"))
def test_equals_the_oracle_over_two_turns(lowering):
    model = llama()
    pieces = tokens(2, *PIECES)
    assert far(model, truth(), pieces, plan=plan_of(model), lowering=lowering) < 1e-5
    torch._dynamo.reset()
    assert far(model, kv_truth.Dense(), pieces, plan=plan_of(model)) > 1e-2, "the spans matter"


@pytest.mark.slow
def test_compiled_by_inductor_for_prompts_of_any_length():
    """One graph of prompts: the tables of a symbolic number of tokens."""
    model = llama()
    plan = plan_of(model)
    fast = torch.compile(model, backend="accelpass", options={"plan": plan}, fullgraph=True)
    cache = KVCache(model, CAPACITY)
    for length in (21, 30, 9, 3):
        cache.reset()
        pieces = tokens(1, length, *[1] * 8, seed=length)
        torch._dynamo.maybe_mark_dynamic(pieces[0], 1)
        got = fed(fast, cache, pieces)
        with attending(model, truth()) as dense:
            want = fed(model, dense, pieces)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4
    # Prompts, tokens, and prompts within one block: their tables have one row, which makes them another kind of tensor.
    assert len(accelpass.explain(fast).graphs) == 3


@pytest.mark.parametrize(
    "passes",
    sweep(
        [{"name": "moa", **SMALL, "alpha": 0, "beta": 1}],
        [{"name": "sink_window", **SMALL, "density": 1}],
        [{"name": "moa", **SMALL, "alpha": CAPACITY, "beta": 0}],
        [{"name": "moa", "alpha": 0, "beta": 0.125}],
        fast=2,
    ),
    ids=["everything", "density 1", "longer than the cache", "prompts within a block"],
)
@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_equals_dense_where_it_must(passes, lowering):
    assert far(llama(), kv_truth.Dense(), tokens(2, *PIECES), passes=passes, lowering=lowering) < 1e-5


@pytest.mark.slow
def test_sink_window_is_one_rule():
    model, passes = llama(), [{"name": "sink_window", **SMALL}]
    assert far(model, truth(HALF), tokens(2, *PIECES), passes=passes) < 1e-5


@pytest.mark.slow
def test_settings_of_sites():
    passes = [{"name": "moa", **SMALL, "alpha": -4, "beta": 0.5, "sites": {"*.1.*": {"alpha": 8, "beta": 0}}}]
    oracle = truth({0: HALF, 1: [(8.0, 0.0)] * 2})
    assert far(llama(), oracle, tokens(2, *PIECES), passes=passes) < 1e-5


def test_a_prompt_without_a_cache():
    """Scoring: the mask alone."""
    model, (ids,) = llama(), tokens(2, 37)
    with torch.no_grad():
        got = torch.compile(model, backend="accelpass", options={"lowering": "aten", "plan": plan_of(model)})(
            input_ids=ids, use_cache=False
        )
        with attending(model, truth()):
            want = model(input_ids=ids, use_cache=False)
    assert torch.allclose(got.logits, want.logits, atol=1e-4)


@pytest.mark.slow
def test_the_cache_takes_what_the_spans_need():
    model = llama()
    cache = KVCache(model, CAPACITY)
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", "plan": plan_of(model)})
    fed(fast, cache, tokens(1, 21, 1, 1))
    rows = {(layer, name): t.shape[2] for layer, name, t in cache.buffers() if name.startswith("kv.keys")}
    # 0.25 N, 0.5 N - 4 and 8 tokens of 48 + 8, in blocks of 4; the last head of the second layer keeps all.
    assert rows == {(0, "kv.keys0"): 16, (0, "kv.keys1"): 24, (1, "kv.keys0"): 8, (1, "kv.keys1"): 48}
    assert cache.nbytes() < 0.55 * cache.dense_nbytes()
    # Which tokens they are is told, for a map of the cache: of 23 the first four, and the newest of 8 slots.
    levels = kept(cache, 0)[0]
    assert (levels == KEPT).nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(19, 23)]
    took = accelpass.explain(fast).passes["moa"].took
    assert took["model.layers.0.self_attn"].what == (
        "spans of 0.25 N (1 heads), 0.5 N - 4 (1 heads) tokens; at most 20 of 48 tokens a head are kept"
    )
    assert took["model.layers.0.self_attn"].densities == (0.5, 0.5, 0.5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    sweep({"name": "int4_weights", "group_size": 32}, {"name": "int8_weights"}),
)
def test_with_packed_weights(weights):
    model, pieces = llama(hidden=64), tokens(1, *PIECES)
    alone = fed(compiled(model, weights), KVCache(model, CAPACITY), pieces)
    torch._dynamo.reset()
    all_spans = {"name": "moa", **SMALL, "alpha": 0, "beta": 1}
    assert torch.allclose(fed(compiled(model, weights, all_spans), KVCache(model, CAPACITY), pieces), alone, atol=1e-4)
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="accelpass", options={"lowering": "eager", "plan": plan_of(model, RULES, weights)}
    )
    assert not torch.allclose(fed(fast, KVCache(model, CAPACITY), pieces), alone, atol=1e-3)
    report = accelpass.explain(fast)
    assert len(report.passes["moa"].took) == 2 and len(report.passes[weights["name"]].took) > 8


@pytest.mark.slow
def test_with_rows_in_few_bits():
    class Rounded(Spans):
        def attend(self, layer, q, k, v, scale, mask, index):
            new = 0 if "kept" not in layer else q.shape[2] if q.shape[2] > 1 else 0
            if "kept" in layer:
                old = [x[:, :, : k.shape[2] - new] for x in (k, v)]
                rounded = [kv_truth.quant_rows(x, 4, 8) for x in old]
                k, v = (torch.cat([r, x[:, :, x.shape[2] - new :]], 2) for r, x in zip(rounded, (k, v), strict=True))
            return super().attend(layer, q, k, v, scale, mask, index)

    model = llama()
    plan = plan_of(model, RULES, {"name": "kv_quant", "bits": 4})
    assert far(model, Rounded(RULES, 4, 4, 8, CAPACITY), tokens(2, *PIECES), plan=plan) < 1e-5


OTHERS = [
    "h2o",
    "kv_window",
    "mikv",
    "cskv",
    "tidaldecode",
    {"name": "pbs_attn", "block": 4, "segment": 8},
    {"name": "sink_window", **SMALL},
]


@pytest.mark.parametrize("other", sweep(*OTHERS, fast=3))
def test_refused_beside_another_form_of_the_cache(other):
    name = other if isinstance(other, str) else other["name"]
    fast = compiled(llama(head_dim=32), other, {"name": "moa", **SMALL, "alpha": 0, "beta": 0.5})
    with pytest.raises(Exception, match=re.compile("|".join((f"'moa'.*'{name}'", f"'{name}'.*'moa'")))):
        fed(fast, KVCache(llama(head_dim=32), CAPACITY), tokens(1, 20, 1))


def test_without_rules():
    with pytest.raises(Exception, match=r"accelpass.calibrate\(model, batches, passes=\['moa'\]\)"):
        fed(compiled(llama(), "moa"), KVCache(llama(), CAPACITY), tokens(1, 9))


def test_a_plan_for_other_heads():
    model = llama()
    plan = plan_of(model, {0: [(0.0, 0.5)] * 3, 1: HALF})
    with pytest.raises(Exception, match=r"spans for 3 key/value heads of model.layers.0.self_attn.* has 2 there"):
        far(model, truth(), tokens(1, 9), plan=plan)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="belongs to another model"):
        far(model, truth(), tokens(1, 9), plan=plan_of(llama(groups=3)))


def test_a_site_that_the_plan_does_not_have():
    model = llama()
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", "plan": plan_of(model, {0: HALF})})
    fed(fast, KVCache(model, CAPACITY), tokens(1, 21, 1))
    assert accelpass.explain(fast).passes["moa"].skipped == {"model.layers.1.self_attn": "the plan has no spans for it"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"alpha": 64}, "alpha=64.0 is not supported; use it together with beta"),
        ({"beta": 0.5}, "beta=0.5 is not supported; use it together with alpha"),
        ({"alpha": 0, "beta": 1.5}, "from 0 to 1"),
        ({"alpha": -64, "beta": 0}, "a number above 0 where beta is 0"),
        ({"density": 0}, "a share of the prompt above 0"),
        ({"block": 0}, "1 token or more"),
        ({"sinks": 65}, "a multiple of block=64"),
        ({"reserve": -1}, "0 or more tokens"),
        ({"step": 0}, "1 or more"),
        ({"sites": {"*.1.*": {"betta": 1}}}, "did you mean 'beta'"),
    ],
)
def test_options(given, says):
    with pytest.raises(OptionError, match=re.escape(says)):
        make({"name": "moa", **given})
    with pytest.raises(OptionError, match="at most 1"):
        make({"name": "sink_window", "density": 1.01})


def test_a_sliding_window_is_left_alone():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    fast = compiled(model, {"name": "moa", **SMALL, "alpha": 0, "beta": 0.25})
    fed(fast, KVCache(model, CAPACITY), tokens(1, 21, 1))
    report = accelpass.explain(fast).passes["moa"]
    assert not report.took and "sees its last 6 tokens alone" in report.skipped["model.layers.0.self_attn"]


def test_attention_to_both_sides_is_left_alone():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config).eval()
    fast = compiled(model, {"name": "moa", **SMALL, "alpha": 0, "beta": 0.25})
    with torch.no_grad():
        got = fast(tokens(1, 21)[0]).last_hidden_state
        assert torch.allclose(got, model(tokens(1, 21)[0]).last_hidden_state, atol=1e-5)
    report = accelpass.explain(fast).passes["moa"]
    assert not report.took and ["it is not causal" in why for why in report.skipped.values()] == [True]


def test_a_padded_prompt_is_dense():
    """Its mask is not causal alone. The cache keeps what it does of any prompt, padding counted as tokens."""

    class Late(Spans):
        def attend(self, layer, q, k, v, scale, mask, index):
            fresh = "kept" not in layer
            spans = super().attend(layer, q, k, v, scale, mask, index)
            if fresh:
                return kv_truth.mixed(kv_truth.probabilities(q, k, scale, mask), v)
            there = torch.zeros(1, k.shape[1], 1, k.shape[2], dtype=torch.bool)
            for head, held in enumerate(layer["kept"]):
                there[0, head, 0, held] = True
            allowed = mask & there.repeat_interleave(q.shape[1] // k.shape[1], 1)
            assert spans.shape == q.shape
            return kv_truth.mixed(kv_truth.probabilities(q, k, scale, allowed), v)

    model, padding = llama(), torch.ones(2, 21, dtype=torch.long)
    padding[0, :5] = 0
    oracle = Late(RULES, 4, 4, 8, CAPACITY)
    assert far(model, oracle, tokens(2, 21, *[1] * 6), padding, plan=plan_of(model)) < 1e-5
    # The first of this test's: Dynamo keeps graphs that other tests broke, as long as the process lives.
    record = next(r for g in accelpass.backends.compiled_graphs() for r in g.report.records if r.name == "moa")
    assert (
        "its prompt is dense: its mask may be more than causal (padding" in record.took["model.layers.0.self_attn"].what
    )


def data(*lengths: int) -> list[torch.Tensor]:
    """Sentences in which what comes next is what came long before: some heads of any model help more than others."""
    torch.manual_seed(5)
    return [torch.randint(0, 96, (1, n // 2 + 1)).repeat(1, 2)[:, :n] for n in lengths]


CALIBRATED = {"name": "moa", **SMALL, "step": 8, "shares": 4, "density": 0.6}


@pytest.mark.slow
def test_calibrated_saved_loaded_compiled(tmp_path):
    model = llama(layers=3)
    plan = accelpass.calibrate(model, data(32, 40, 32, 40, 48), [CALIBRATED], progress=False)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    found = {name: t.tolist() for name, t in plan.tensors.items() if name.startswith("moa/rules/")}
    rules = {int(name.split(".")[2]): [tuple(rule) for rule in of] for name, of in found.items()}
    assert sorted(rules) == [0, 1, 2] and all(p.grad is None for p in model.parameters())
    for length in (32, 40):
        masks = [
            moa_mask(torch.tensor([a]), torch.tensor([b]), length, 4, 4)[0] for of in rules.values() for a, b in of
        ]
        assert sum(float(m[-1].sum()) / length for m in masks) / len(masks) <= 0.6
    assert len({rule for of in rules.values() for rule in of}) > 1, "heads differ"
    ids = data(32, 40, 32, 40, 48)[-1]
    worth = []
    for oracle in (kv_truth.Dense(), truth(rules)):
        with torch.no_grad(), attending(model, oracle):
            worth.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss.exp()))
    assert plan.tensors["moa/perplexity"].tolist() == pytest.approx(worth, rel=1e-4)
    assert far(model, truth(rules), tokens(1, *PIECES), plan=plan) < 1e-5


def test_calibration_beats_the_uniform_window_in_its_own_measure():
    """Every rule the uniform window could have is among those that are searched, so that it can only be better."""
    from rich.progress import Progress

    from accelpass.api.calibration.loss_study import LossStudy
    from accelpass.passes.sparse_attention.moa_profile import Profile

    model, p = llama(layers=3), make({**CALIBRATED, "sinks": 0})
    profile = Profile(p.block)
    batches = [{"input_ids": ids} for ids in data(32, 32)]
    with Progress(disable=True) as bar:
        LossStudy(model, batches, batches, bar, "moa").gradients(profile.attend, "")
    (best,) = p.search(profile)
    cost = sum(float(profile.losses(s, 32, of, 0).diagonal().sum()) for s, of in best.items())
    uniform = sum(float(profile.losses(s, 32, [(0.0, 0.5)], 0).sum()) for s in best)
    assert cost < uniform


def test_labels_that_do_not_count_change_nothing():
    """The loss is of the answer alone: what the prompt's own tokens are predicted as has no influence."""
    model = llama()
    ids = data(32, 40)
    labels = [torch.where(torch.arange(t.shape[1]) < 20, -100, t) for t in ids]
    batches = [{"input_ids": t, "labels": one} for t, one in zip(ids, labels, strict=True)]
    plan = accelpass.calibrate(model, batches[:1], [CALIBRATED], progress=False, validation=batches[1:])
    with torch.no_grad():
        want = float(model(**batches[1], use_cache=False).loss.exp())
    assert float(plan.tensors["moa/perplexity"][0]) == pytest.approx(want, rel=1e-4)
    with pytest.raises(OptionError, match="no label that counts"):
        accelpass.calibrate(
            model, [{"input_ids": ids[0], "labels": torch.full_like(ids[0], -100)}], [CALIBRATED], False
        )


@pytest.mark.slow
def test_many_lengths():
    """Each is a graph of its own, and each is measured: Dynamo stops at eight by itself."""
    lengths = range(24, 34)
    plan = accelpass.calibrate(llama(layers=1), data(*lengths), [{**CALIBRATED, "density": 0.9}], False, data(40))
    assert plan.tensors["moa/perplexity"].isfinite().all()


@pytest.mark.slow
def test_nothing_to_calibrate():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    with pytest.raises(AccelpassError, match=r"moa found no attention to calibrate: model.layers.0.*sliding window"):
        accelpass.calibrate(MistralForCausalLM(config).eval(), data(32), [CALIBRATED], progress=False)
    with pytest.raises(PassError, match=r"mean density of 0.05 or less; the narrowest have"):
        accelpass.calibrate(llama(), data(32), [{**CALIBRATED, "density": 0.05}], progress=False)
    padded = {"input_ids": data(36)[0], "attention_mask": (torch.arange(36) > 4).long()[None]}
    with pytest.raises(PassError, match=r"on some of the batches alone.*as for padding.*without padding"):
        accelpass.calibrate(llama(), [*data(32), padded], [CALIBRATED], progress=False, validation=data(40))
    with pytest.raises(PassError, match=r"in a held-back batch they cannot be tried: .* without padding"):
        accelpass.calibrate(llama(), data(32), [CALIBRATED], progress=False, validation=[padded])
