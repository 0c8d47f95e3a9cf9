"""Experts taken out and merged: the card's formulas in eager, real bytes, the evolution's steps, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.models_zoo import small
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.experts.eep_search import Evolution, selection
from tests.small_models import relative_error
from tests.sweep import examples

pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12)
PATHS = [f"model.layers.{n}.mlp" for n in range(2)]


class Merged(nn.Module):
    """A mixture as the card has it: merged experts, mapped probabilities, and all experts on all tokens."""

    def __init__(self, block: Any, merge: Tensor, route: Tensor) -> None:
        super().__init__()
        self.gate, self.k, self.route = block.gate.weight, block.gate.top_k, route
        self.up, self.down = (
            torch.einsum("je,eab->jab", merge, w) for w in (block.experts.gate_up_proj, block.experts.down_proj)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        p = (x @ self.gate.T).float().softmax(-1) @ self.route.T
        v, i = p.topk(self.k, -1)
        v = v / v.sum(-1, keepdim=True)
        gate, up = torch.einsum("ehd,td->teh", self.up, x).chunk(2, -1)
        y = torch.einsum("edh,teh->ted", self.down, F.silu(gate) * up)
        y = (y.gather(1, i[..., None].expand(-1, -1, x.shape[1])) * v[..., None]).sum(1)
        return y.view_as(hidden_states)


def by_the_card(model: Any, matrices: list[tuple[Tensor, Tensor]]) -> Any:
    made = copy.deepcopy(model)
    for layer, pair in zip(made.model.layers, matrices, strict=True):
        layer.mlp = Merged(layer.mlp, *pair)
    return made


def tensors(matrices: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pairs = zip(PATHS, matrices, strict=True)
    return {f"eep/{p}/{what}": m for p, pair in pairs for what, m in zip(("experts", "router"), pair, strict=True)}


def compiled(model: Any, *passes: Any, plan: Any = None, **options: Any) -> Any:
    torch._dynamo.reset()
    asked = {"passes": list(passes), "plan": plan, "lowering": "eager", **options}
    return torch.compile(model, backend="accelpass", options=asked)


@settings(max_examples=examples(2), deadline=None)
@given(seed=st.integers(0, 99), form=st.sampled_from(["batched_mm", "grouped_mm"]), keep=st.integers(2, 4))
def test_merged_experts_are_the_cards(seed: int, form: str, keep: int):
    model, draw = small.experts(seed % 3, form=form), torch.Generator().manual_seed(seed)
    pairs = [(torch.rand(keep, 4, generator=draw), torch.rand(keep, 4, generator=draw)) for _ in PATHS]
    plan = Plan.of(model, ["eep"], tensors(pairs))
    with torch.no_grad():
        fast = compiled(model, "eep", plan=plan)
        want = by_the_card(model, pairs)(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4


@settings(max_examples=examples(2), deadline=None)
@given(form=st.sampled_from(["batched_mm", "grouped_mm"]), keep=st.sets(st.integers(0, 3), min_size=2, max_size=3))
def test_experts_taken_out_are_the_cards_and_the_router_loses_their_rows(form: str, keep: set[int]):
    model, one = small.experts(1, form=form), torch.eye(4)[sorted(keep)]
    with torch.no_grad():
        fast = compiled(model, {"name": "eep", "keep": sorted(keep)})
        want = by_the_card(model, [(one, one)] * 2)(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4
    took = accelpass.explain(fast).passes["eep"].took
    assert [*took] == PATHS
    for done in took.values():
        assert {s.path.split(".")[-2]: s.after[0] for s in done.shrunk} == {"gate": len(keep), "experts": len(keep)}
        assert done.bytes_after * 4 == done.bytes_before * len(keep)


def test_a_plan_may_keep_other_experts_in_each_layer_and_follows_weights():
    model = small.experts(0, form="grouped_mm")
    pairs = [(torch.eye(4)[rows],) * 2 for rows in ([3, 1], [0, 1])]
    fast = compiled(model, "eep", plan=Plan.of(model, ["eep"], tensors(pairs)))
    with torch.no_grad():
        fast(IDS, use_cache=False)
        model.load_state_dict(small.experts(2).state_dict())
        want = by_the_card(model, pairs)(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4


def test_gates_that_are_not_divided_by_their_sum_keep_the_whole_softmax():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 6, bias=False)
            self.up, self.down = (nn.Parameter(torch.randn(6, 16, 16) / 4) for _ in range(2))

        def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
            v, i = self.gate(x).softmax(-1).topk(2, -1)
            rows, ids = x.repeat_interleave(2, 0).unsqueeze(-1), i.flatten()
            y = torch.bmm(self.down[ids], torch.bmm(self.up[ids], rows).relu()).squeeze(-1) * v.flatten().unsqueeze(-1)
            return y.view(len(x), 2, -1).sum(1)

    torch.manual_seed(0)
    model, x, keep = Plain().eval(), torch.randn(7, 16), [1, 2, 5]
    fast = compiled(model, {"name": "eep", "keep": keep})
    with torch.no_grad():
        found = fast(x)
        p = model.gate(x).softmax(-1)[:, keep]
        v, i = p.topk(2, -1)
        y = torch.einsum("edh,teh->ted", model.down[keep], torch.einsum("ehd,td->teh", model.up[keep], x).relu())
        want = (y.gather(1, i[..., None].expand(-1, -1, 16)) * v[..., None]).sum(1)
    assert relative_error(found, want) < 1e-5
    (done,) = accelpass.explain(fast).passes["eep"].took.values()
    assert sorted(s.path for s in done.shrunk) == ["down", "up"], "the gate keeps its rows"


@pytest.mark.parametrize("form", ["batched_mm", "grouped_mm"])
def test_smaller_experts_are_packed_and_multiplied_as_such(form: str):
    model = small.experts(0, form=form)
    one = torch.eye(4)[[0, 2, 3]]
    fast = compiled(model, {"name": "eep", "keep": (0, 2, 3)}, "int8_weights", "tutel_moe")
    with torch.no_grad():
        want = by_the_card(model, [(one, one)] * 2)(IDS, use_cache=False).logits
        assert 0 < relative_error(fast(IDS, use_cache=False).logits, want) < 0.05
    assert "3 experts" in str(accelpass.explain(fast).passes["tutel_moe"].took)


def test_a_file_has_the_smaller_experts():
    from accelpass.backends.export.capture import bound, captured
    from accelpass.passes.core.base import Record

    model, record = small.experts(0, layers=1), Record("eep")
    program = captured(model, bound(model, (IDS,), {"use_cache": False}), None).program
    make({"name": "eep", "keep": (0, 1, 3)}).apply(program, record)
    assert [*record.took] == PATHS[:1] and not record.skipped
    sizes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if "_kept" in n.name]
    assert sorted(sizes) == [(3, 32), (3, 32, 64), (3, 128, 32)]


def test_what_does_not_fit_says_so():
    model = small.experts(0)
    for bad, match in (({"keep": (1, 1)}, "each once"), ({"keep": (-1,)}, "from 0"), ({"experts": 0}, "at least 1")):
        with pytest.raises(accelpass.OptionError, match=match):
            make({"name": "eep", **bad})
    with pytest.raises(Exception, match="numbers below 4, the experts of"), torch.no_grad():
        compiled(model, {"name": "eep", "keep": (0, 4)})(IDS, use_cache=False)
    for pairs in ([(torch.eye(5)[:3],) * 2] * 2, [(torch.eye(4)[:3], torch.eye(4)[:2])] * 2):
        plan = Plan.of(model, ["eep"], tensors(pairs))
        with pytest.raises(Exception, match="which has 4 experts; search again with this model"), torch.no_grad():
            compiled(model, "eep", plan=plan)(IDS, use_cache=False)
    of_one = {name: m for name, m in tensors([(torch.eye(4)[:3],) * 2] * 2).items() if "layers.0" in name}
    with pytest.raises(Exception, match="the plan has no experts for"), torch.no_grad():
        compiled(model, "eep", plan=Plan.of(model, ["eep"], of_one))(IDS, use_cache=False)
    for asked, why in (
        ({"keep": (1,)}, "1 experts are fewer than the 2 that each token goes to"),
        ({}, "there is no plan of it; make one with accelpass.search_by_score"),
        ({"keep": (0, 1, 2, 3)}, "all experts stay"),
    ):
        fast = compiled(model, {"name": "eep", **asked})
        with torch.no_grad():
            assert relative_error(fast(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-5
        assert why in str(accelpass.explain(fast).passes["eep"].skipped)
    fast = compiled(small.tiny_lm(), {"name": "eep", "keep": (0,)})
    with torch.no_grad():
        fast(IDS)
    assert "no mixture of experts was found" in str(accelpass.explain(fast).passes["eep"].skipped)
    fast = compiled(small.pooled(), {"name": "eep", "keep": (0, 1)}, "expert_pool")
    with torch.no_grad():
        fast(IDS)
    assert "too" in str(accelpass.explain(fast).passes["eep"].skipped)


# --- the search


def test_a_selection_is_told_from_a_sum():
    one = torch.eye(5)[[4, 0, 2]]
    assert selection(one, one) == [0, 2, 4]
    assert selection(one, torch.eye(5)[[0, 4, 2]]) is None, "both select, and not the same"
    assert selection(torch.eye(5)[[1, 1]], torch.eye(5)[[1, 1]]) is None
    assert selection(one * 0.5, one * 0.5) is None


@settings(max_examples=examples(10), deadline=None)
@given(seed=st.integers(0, 999), keep=st.integers(1, 5))
def test_the_first_candidates_are_whole_experts_and_later_ones_are_near_good_ones(seed: int, keep: int):
    evolution = Evolution({"a": 6, "b": 5}, keep, 1.0, seed)
    for number in range(40):
        one = evolution.selected()
        assert [selection(*one[p]) is not None and len(one[p][0]) == keep for p in one] == [True, True]
        evolution.add(one, float(number == 7))  # all are within 3 points, so any may be a parent
    rows = {tuple(m.flatten().tolist()) for _, one in evolution.scored[:30] for m in (one["a"][0],)}
    assert keep in (0, 6) or len(rows) > 1
    parents = [evolution.scored[7][1]]
    evolution.scored = [evolution.scored[7]]
    changed = 0
    for _ in range(60):
        child = evolution.merged()
        for path, (merge, route) in child.items():
            assert merge.shape == route.shape == parents[0][path][0].shape
            changed += not torch.equal(route, parents[0][path][1])
    assert 8 < changed < 60, "a quarter of the layers is touched"
    evolution.add(parents[0], float("nan"))
    assert evolution.scored[-1][0] == float("-inf")


@pytest.mark.slow
def test_the_search_finds_the_experts_that_a_score_wants_and_leaves_the_model(tmp_path: Any):
    model = small.experts(0)
    before = copy.deepcopy(model.state_dict())
    good = torch.eye(4)[[1, 2, 3]]
    wanted = by_the_card(model, [(good, good)] * 2)
    with torch.no_grad():
        target = wanted(IDS, use_cache=False).logits

    def score(fast: Any) -> float:
        return -100 * relative_error(fast(IDS, use_cache=False).logits, target)

    asked = {"name": "eep", "experts": 3, "trials": 60, "pruning_trials": 50}
    options = {"lowering": "eager"}
    plan = accelpass.search_by_score(model, score, [asked], progress=False, options=options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    plan.save(tmp_path / "eep.json")
    with torch.no_grad():
        fast = compiled(model, plan=Plan.load(tmp_path / "eep.json"))
        assert relative_error(fast(IDS, use_cache=False).logits, target) < 0.02
    assert {d.shrunk[-1].after[0] for d in accelpass.explain(fast).passes["eep"].took.values()} == {3}
    again = accelpass.search_by_score(model, score, [asked], progress=False, options=options)
    assert all(torch.equal(t, again.tensors[n]) for n, t in plan.tensors.items()), "a seed repeats it"


def test_candidates_are_what_their_plan_is():
    """The model in the search, written with a candidate, computes what the pass makes of it."""
    model, draw = small.experts(0, form="grouped_mm"), torch.Generator().manual_seed(3)
    seen: list[tuple[dict[str, Tensor], Tensor]] = []

    def score(fast: Any) -> float:
        found = accelpass.read(fast, "eep/*")
        seen.append((found, fast(IDS, use_cache=False).logits))
        return float(torch.rand((), generator=draw))

    asked = {"name": "eep", "experts": 2, "trials": 4, "pruning_trials": 2}

    def quiet(fast: Any) -> float:
        return score(fast) if accelpass_ready(fast) else float(fast(IDS, use_cache=False).logits.sum())

    def accelpass_ready(fast: Any) -> bool:
        try:
            return bool(accelpass.read(fast, "eep/*"))
        except accelpass.AccelpassError:
            return False

    accelpass.search_by_score(model, quiet, [asked], progress=False, options={"lowering": "eager"})
    for written, logits in (seen[0], seen[3]):
        pairs = [tuple(written[f"eep/{p}/{w}"] + torch.eye(2, 4) for w in ("experts", "router")) for p in PATHS]
        with torch.no_grad():
            assert relative_error(by_the_card(model, pairs)(IDS, use_cache=False).logits, logits) < 1e-4


def test_a_search_that_cannot_be_says_so():
    options: dict[str, Any] = {"progress": False, "options": {"lowering": "eager"}}
    call = lambda fast: float(fast(IDS, use_cache=False).logits.sum())  # noqa: E731
    with pytest.raises(accelpass.OptionError, match="one pass that is judged by a score at a time; none given"):
        accelpass.search_by_score(small.experts(), call, ["int8_weights"], **options)
    with pytest.raises(Exception, match="a token goes to 2; use a number from 2 to 4"):
        accelpass.search_by_score(small.experts(), call, [{"name": "eep", "experts": 1}], **options)
    with pytest.raises(accelpass.PassError, match="the model has no experts to take out"):
        accelpass.search_by_score(small.tiny_lm(), lambda fast: float(fast(IDS).sum()), ["eep"], **options)
    with pytest.raises(accelpass.OptionError, match="score returned NoneType"):
        accelpass.search_by_score(small.experts(), lambda fast: None, ["eep"], **options)  # type: ignore[arg-type,return-value]
