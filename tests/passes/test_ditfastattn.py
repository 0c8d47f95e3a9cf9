"""DiTFastAttn and its plan search against eager ones that are written from the method's card."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.api.lookup import find
from accelpass.ir.attention.spec.op import is_attention, set_spec, spec_of
from accelpass.ir.attention.spec.spec import Band
from accelpass.ir.core.graph import aten, is_call
from accelpass.ir.errors import OptionError
from accelpass.ir.transform.steps import StepError
from accelpass.models_zoo import tiny_diffusers
from accelpass.passes.core.base import Done, Pass
from accelpass.passes.step_cache.ditfastattn import DiTFastAttn
from accelpass.passes.step_cache.ditfastattn_search import DiTFastAttnSearch, InSearch, relative_difference
from tests.packing import dequantize_int4, pack_int4, pack_int8
from tests.passes.step_truth import Greedy, denoise, denoise_by_calls, fast_attention
from tests.sweep import examples, sweep

TIMES = [9, 7, 5, 4, 2, 1]
PATHS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
LETTERS = st.tuples(*[st.text("FAWXC", min_size=5, max_size=5).map(lambda s: "F" + s)] * 2)
EVERY = [
    *(f"{method}{residual}{output}" for method in ("full", "half", "twin") for residual in ("", "+residual") for output in ("", "+output")),
    *(f"{method}{output}" for method in ("window", "window+half") for output in ("", "+output")), "share",
]  # fmt: skip


@dataclass(frozen=True)
class EveryWay(InSearch):
    """Compiles whatever a plan may ask for."""

    def actions(self, site: str) -> list[str]:
        return EVERY


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    return model.eval(), call


def fast_of(
    model: nn.Module, lowering: str = "eager", others: tuple[Any, ...] = (), free: bool = False, **given: Any
) -> Any:
    made = {"name": "ditfastattn", "timesteps": TIMES, "window": 3, **given}
    options = {"passes": [made, *others], "lowering": lowering, "free_weights": free}
    return torch.compile(model, backend="accelpass", options=options)


def truth_of(model: nn.Module, methods: dict[str, str], window: int = 3, **given: Any) -> nn.Module:
    return fast_attention(copy.deepcopy(model), methods, window, **given)


def follow(fast: Any, plan: DiTFastAttn) -> None:
    """Let a model that is compiled in every way follow a plan."""
    (graph,) = find(fast).graphs
    graph.steps.passes = (plan,)
    for made in graph.steps.models.values():
        made.sites[:] = [[(plan, path) for _, path in block] for block in made.sites]
    accelpass.reset(fast)


def same(found: list[Tensor], truth: list[Tensor]) -> None:
    for step, (a, b) in enumerate(zip(found, truth, strict=True)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, step=step: f"step {step}: {m}")


def report_of(fast: Any) -> Any:
    return find(fast).graphs[0].report


# --- plans


@pytest.mark.parametrize(("name", "window", "first"), sweep(("dit", 3, True), ("pixart", 0, False)))
def test_follows_the_oracle(name: str, window: int, first: bool) -> None:
    model, call = model_of(name)
    every = EveryWay(window=window, cond_first=first)
    fast = torch.compile(model, backend="accelpass", options={"passes": [every], "lowering": "eager"})
    denoise(fast, call, TIMES[:1])

    @settings(max_examples=examples(8), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(letters=LETTERS)
    def plans(letters: tuple[str, str]) -> None:
        methods = dict(zip(PATHS, letters, strict=True))
        follow(fast, DiTFastAttn(methods=methods, timesteps=tuple(TIMES), window=window, cond_first=first))
        truth = denoise(truth_of(model, methods, window, cond_first=first), call, TIMES)
        same(denoise(fast, call, TIMES), truth)
        same(denoise(fast, call, TIMES), truth)

    plans()

    @settings(max_examples=examples(8), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(letters=LETTERS)
    def plans_by_calls(letters: tuple[str, str]) -> None:
        methods = dict(zip(PATHS, letters, strict=True))
        follow(fast, DiTFastAttn(methods=methods, timesteps=tuple(TIMES), window=window, guidance="calls"))
        truth = denoise_by_calls(truth_of(model, methods, window, calls=True), call, TIMES)
        same(denoise_by_calls(fast, call, TIMES), truth)
        same(denoise_by_calls(fast, call, TIMES), truth)

    if name == "dit":
        plans_by_calls()


def test_follows_the_oracle_when_compiled_for_its_plan() -> None:
    model, call = model_of("dit")
    methods = dict(zip(PATHS, ("FWAXCW", "FAFWAF"), strict=True))
    fast = fast_of(model, methods=methods)
    same(denoise(fast, call, TIMES), denoise(truth_of(model, methods), call, TIMES))
    # Kept is what some step reads: the residual up to the last window, the output where something is shared.
    assert sorted(b.name for b in accelpass.state(fast)) == [
        f"{path}:{what}" for path in PATHS for what in ("output", "residual")
    ]
    report = report_of(fast).steps
    assert report.sites == PATHS
    assert report.actions[0] == ("full", "full")
    assert [row[0] for row in report.actions] == [
        "full", "window", "reuse", "window+half", "half", "window",
    ]  # fmt: skip
    assert {row[1] for row in report.actions} == {"full", "reuse", "window"}


@pytest.mark.slow
def test_by_calls_when_compiled_for_its_plan() -> None:
    model, call = model_of("dit")
    methods = dict(zip(PATHS, ("FCWAXW", "FXCAFC"), strict=True))
    fast = fast_of(model, methods=methods, guidance="calls")
    truth = denoise_by_calls(truth_of(model, methods, calls=True), call, TIMES)
    same(denoise_by_calls(fast, call, TIMES), truth)
    names = [b.name for b in accelpass.state(fast)]
    assert f"{PATHS[0]}:output (call 2)" in names


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    model, call = model_of("dit")
    methods = {PATHS[0]: "FW", PATHS[1]: "FW"}
    fast = fast_of(model, "inductor", methods=methods, timesteps=TIMES[:2])
    truth = denoise(truth_of(model, methods), call, TIMES[:2])
    same(denoise(fast, call, TIMES[:2]), truth)
    same(denoise(fast, call, TIMES[:2]), truth)


@pytest.mark.parametrize("methods", [dict.fromkeys(PATHS, "FFFFFF"), dict.fromkeys(PATHS, "F")])
def test_dense(methods: dict[str, str]) -> None:
    model, call = model_of("dit")
    times = TIMES[: len(next(iter(methods.values()), "F"))]
    fast = fast_of(model, methods=methods, timesteps=times)
    for a, b in zip(denoise(fast, call, times), denoise(model, call, times), strict=True):
        assert torch.equal(a, b)
    assert not accelpass.state(fast)
    assert set(report_of(fast).steps.flops) <= {report_of(fast).steps.dense}


def test_a_window_of_all_tokens_is_full_attention() -> None:
    model, call = model_of("dit")
    fast = fast_of(model, methods=dict.fromkeys(PATHS, "FWWFWW"), window=16)
    same(denoise(fast, call, TIMES), denoise(model, call, TIMES))


def test_what_a_shared_module_saves() -> None:
    model, call = model_of("dit")
    fast = fast_of(model, methods={PATHS[0]: "FACCWX", PATHS[1]: "FFFFFF"})
    denoise(fast, call, TIMES)
    (graph,) = find(fast).graphs
    (made,) = graph.steps.models.values()

    def linears(action: str) -> int:
        return sum(is_call(n, aten.linear) for n in made.stages[0, (action,)].fn.__self__.graph.nodes)

    def attentions(action: str) -> int:
        nodes = made.stages[0, (action,)].fn.__self__.graph.nodes
        return sum(is_call(n, aten.scaled_dot_product_attention) or is_attention(n) for n in nodes)

    assert linears("share") == linears("full") - 4, "queries, keys, values and the out-projection"
    assert attentions("share") == 0 < attentions("full")
    flops = dict(zip("FACCWX", graph.report.steps.flops, strict=True))
    dense = graph.report.steps.dense
    # 2 images of 16 tokens of 64 channels: four projections, and attention's two products.
    projections, products = 4 * 2 * 2 * 16 * 64 * 64, 2 * 2 * 2 * 16 * 16 * 64
    gone = dense - flops["A"]
    assert projections + products <= gone <= 1.1 * (projections + products)
    assert dense - flops["C"] == pytest.approx(gone / 2, rel=0.05)
    assert flops["A"] < flops["X"] < flops["C"] < dense and flops["X"] < flops["W"] < dense


def test_a_second_order_scheduler() -> None:
    model, call = model_of("dit")
    times, methods = [9, 5, 5, 2, 2], dict(zip(PATHS, ("FAWCF", "FWFAX"), strict=True))
    fast = fast_of(model, methods=methods, timesteps=times)
    truth = denoise(truth_of(model, methods), call, times)
    for _ in range(2):
        same(denoise(fast, call, times), truth)


def test_sites_that_are_left_out() -> None:
    model, call = model_of("dit")
    fast = fast_of(model, methods=dict.fromkeys(PATHS, "FAFAFA"), exclude=("transformer_blocks.0.*",))
    same(denoise(fast, call, TIMES), denoise(truth_of(model, {PATHS[1]: "FAFAFA"}), call, TIMES))
    assert report_of(fast).records[0].skipped == {PATHS[0]: "named in exclude=['transformer_blocks.0.*']"}


# --- the search


def searched(
    model: nn.Module, call: dict[str, Any], times: list[float], delta: float, **given: Any
) -> tuple[Any, list[Tensor]]:
    made: list[Tensor] = []
    asked = {"name": "ditfastattn", "threshold": delta, "window": 2}
    plan = accelpass.search_steps(
        model, lambda fast: made.extend(denoise(fast, call, times, **given)), [asked], options={"lowering": "eager"}, progress=False,
    )  # fmt: skip
    return plan.settings[0], made


@pytest.mark.parametrize(("guided", "candidates"), sweep((True, "AXWC"), (False, "AW")))
def test_search_is_the_cards(guided: bool, candidates: str) -> None:
    """Letter for letter, at thresholds that give mixed plans; and what the search shows its caller is the decided output."""
    model, call = model_of("dit")
    times, seen = [9, 6, 3, 1], set()
    every: list[Tensor] = []
    for delta in (0.12, 0.3) if guided else (0.2,):
        torch._dynamo.reset()
        greedy = Greedy(copy.deepcopy(model), PATHS, 2, delta, candidates)
        truth = denoise(greedy, call, times, guided=guided)
        plan, made = searched(model, call, times, delta, guided=guided)
        assert plan["methods"] == greedy.letters
        assert plan["guidance"] == ("batch" if guided else "none")
        assert plan["timesteps"] == tuple(times) and plan["latents"] == (4, 8, 8)
        same(made, truth)
        every += made
        seen |= {letter for letters in greedy.letters.values() for letter in letters[1:]}
    assert len(seen) >= 3 if guided else len(seen) >= 2, (
        f"the plans are of {seen} alone: other thresholds would test more"
    )


@pytest.mark.slow
def test_search_at_threshold_0() -> None:
    model, call = model_of("dit")
    plan, made = searched(model, call, TIMES[:3], 0.0)
    assert plan["methods"] == dict.fromkeys(PATHS, "FFF")
    same(made, denoise(model, call, TIMES[:3]))


def test_a_second_run_in_a_search_is_refused() -> None:
    class Ended:
        step, branch, time, sites, latents = 0, 0, 9.0, (), torch.zeros(2, 1)

    search = DiTFastAttnSearch(DiTFastAttn(), lambda said: None)
    search.choose(Ended())
    with pytest.raises(accelpass.PassError, match="searched in one sampling run, and a second one began"):
        search.choose(Ended())


def test_the_authors_loss() -> None:
    a, b = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([2.0, -2.0, 2.0, -3.0])
    # 1/2; 1/1 by the larger number, which is -1; 0; clipped at 10.
    assert relative_difference(a, b) == pytest.approx((0.5 + 1 + 0 + 10) / 4, rel=1e-4)


# --- with other passes


def packed(model: nn.Module) -> nn.Module:
    """MLPs as int4 in groups of 32, other linears as int8, and back to floats."""
    made = copy.deepcopy(model)
    for path, module in made.named_modules():
        if isinstance(module, nn.Linear):
            w = module.weight.data
            if ".ff." in path:
                q, scale = pack_int4(w, 32, True)
                module.weight.data = dequantize_int4(q, scale, None, 32, w.dtype)
            else:
                q, scale = pack_int8(w)
                module.weight.data = q * scale[:, None]
    return made


@pytest.mark.slow
def test_with_packed_weights() -> None:
    model, call = model_of("dit")
    methods = dict(zip(PATHS, ("FWAXCW", "FAFWAF"), strict=True))
    others = (
        {"name": "int8_weights", "exclude": ["ff"]},
        {"name": "int4_weights", "group_size": 32, "include": ["ff"]},
    )
    truth = denoise(truth_of(packed(model), methods), call, TIMES)
    fast = fast_of(model, "eager", others, methods=methods)
    same(denoise(fast, call, TIMES), truth)
    (graph,) = find(fast).graphs
    (made,) = graph.steps.models.values()
    total = sum(
        sum(
            t.numel() * t.element_size()
            for t in (pack_int4(m.weight, 32, True) if ".ff." in path else pack_int8(m.weight))
        )
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and made.derived
    )
    assert graph.report.derived_bytes <= total, "one packed form for all variants"
    torch._dynamo.reset()
    freed = copy.deepcopy(model)
    fast = fast_of(freed, "eager", others, free=True, methods=methods)
    same(denoise(fast, call, TIMES), truth)
    same(denoise(fast, call, TIMES), truth)
    assert freed.transformer_blocks[0].attn1.to_q.weight.untyped_storage().nbytes() == 0


@dataclass(frozen=True)
class Edits(Pass):
    """Gives every attention a window of its own."""

    name: ClassVar[str] = "edits"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "for tests"

    def apply(self, program: Any, record: Any) -> None:
        for node in list(program.graph.nodes):
            if is_attention(node):
                set_spec(node, spec_of(node).edited(by="edits", select=Band(5)))
                record.take(node.name, Done("a window"))


@pytest.mark.parametrize("letter", "WC")
def test_an_attention_that_another_pass_has_edited(letter: str) -> None:
    model, call = model_of("dit")
    methods = dict.fromkeys(PATHS, f"FF{letter}")
    fast = fast_of(model, "eager", (Edits(),), methods=methods, timesteps=TIMES[:3])
    with pytest.raises(Exception, match=r"'ditfastattn' and 'edits' \(select\) cannot both have the attention at"):
        denoise(fast, call, TIMES[:3])


@pytest.mark.slow
def test_an_edited_attention_can_be_shared() -> None:
    model, call = model_of("dit")
    fast = fast_of(model, "eager", (Edits(),), methods=dict.fromkeys(PATHS, "FF"), timesteps=TIMES[:2])
    windowed = denoise(fast, call, TIMES[:2])
    torch._dynamo.reset()
    shared = fast_of(model, "eager", (Edits(),), methods=dict.fromkeys(PATHS, "FA"), timesteps=TIMES[:2])
    found = denoise(shared, call, TIMES[:2])
    assert torch.equal(found[0], windowed[0]) and not torch.allclose(found[1], windowed[1], atol=1e-3)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": -1.0}, "threshold=-1.0 is not supported"),
        ({"window": -1}, "window=-1 is not supported"),
        ({"methods": {"a": "FA", "b": "F"}}, "one letter for each model call"),
        ({"methods": {"a": "FA"}, "timesteps": (1.0,)}, r"one letter for each model call \(1\)"),
        ({"methods": {"a": "AF"}}, "F at the first step; a has 'AF'"),
        ({"methods": {"a": "FZ"}}, "letters of FAXWC"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        DiTFastAttn(**options)


def test_two_passes_that_choose_by_step() -> None:
    from accelpass.passes.core.plan import Plan
    from accelpass.passes.step_cache.tokencache import IMPORTANCE, TokenCache

    model, call = model_of("dit")
    blocks = TokenCache(paths=("transformer_blocks.0", "transformer_blocks.1"), timesteps=(9.0, 5.0))
    plan = Plan.of(model, [DiTFastAttn(), blocks], {IMPORTANCE: torch.rand(2, 2, 16)})
    fast = torch.compile(model, backend="accelpass", options={"plan": plan, "lowering": "eager"})
    with pytest.raises(Exception, match="ditfastattn and tokencache both choose what a block computes"):
        denoise(fast, call, [9, 5])


@pytest.mark.parametrize("batch", [2, 3])
def test_halves_that_are_missing(batch: int) -> None:
    model, call = model_of("dit")
    call = {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.full((batch,), 9),
        "class_labels": torch.arange(batch),
    }
    fast = fast_of(model, methods=dict.fromkeys(PATHS, "FC"), timesteps=TIMES[:2])
    seen = "holds different latents in its two halves" if batch == 2 else r"is odd \(3\)"
    with pytest.raises(StepError, match=f"for one guidance half alone, and the batch {seen}"):
        denoise(fast, call, TIMES[:2], guided=False)
