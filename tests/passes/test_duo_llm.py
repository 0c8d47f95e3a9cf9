"""Small feed-forward layers beside big ones: fixed routes, routers, how they are fitted, and what is refused."""

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
from accelpass.passes.feed_forward.fitting import Sums, fitted_router, largest
from tests.pass_settings import _small_parts
from tests.small_models import relative_error
from tests.sweep import examples

pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12)


class Duo(nn.Module):
    """The card's layer: both parts of all tokens, and a choice by route (0 skip, 1 small, 2 big)."""

    def __init__(self, big: nn.Module, parts: dict[str, Tensor], route: str) -> None:
        super().__init__()
        self.big, self.parts, self.route = big, parts, route
        self.routes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        p = self.parts
        small_of = F.linear(F.silu(x @ p["gate"].T) * (x @ p["up"].T), p["down"], p["bias"])
        match self.route:
            case "router":
                route = 1 + (x @ p["router"].T).argmax(-1)
            case fixed:
                route = torch.full(x.shape[:-1], ("skip", "small", "big").index(fixed))
        self.routes.append(route)
        y = torch.where((route == 2)[..., None], self.big(x), torch.zeros_like(x))
        return torch.where((route == 1)[..., None], small_of, y)


def by_the_card(model: Any, parts: dict[str, Tensor], *routes: str) -> Any:
    made = copy.deepcopy(model)
    for n, (layer, route) in enumerate(zip(made.model.layers, routes, strict=True)):
        first = f"duo_llm/model.layers.{n}.mlp/"
        layer.mlp = Duo(layer.mlp, {k.removeprefix(first): t for k, t in parts.items() if first in k}, route)
    return made


def compiled(model: Any, *passes: Any, plan: Any = None, **options: Any) -> Any:
    torch._dynamo.reset()
    asked = {"passes": list(passes), "plan": plan, "lowering": "eager", **options}
    return torch.compile(model, backend="accelpass", options=asked)


@settings(max_examples=examples(3), deadline=None)
@given(seed=st.integers(0, 9), routes=st.tuples(*[st.sampled_from(["router", "small", "skip", "big"])] * 2))
def test_layers_are_the_cards(seed: int, routes: tuple[str, str]):
    model, parts = small.decoder(seed), _small_parts()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    sites = {f"*.layers.{n}.mlp": {"route": route} for n, route in enumerate(routes)}
    asked = {"name": "duo_llm", "sites": sites}
    fast = compiled(model, asked, plan=Plan.of(model, [asked], parts))
    with torch.no_grad():
        want = by_the_card(model, parts, *routes)(ids, use_cache=False).logits
        assert relative_error(fast(ids, use_cache=False).logits, want) < 1e-4


def test_routed_tokens_alone_are_multiplied_with_big_weights(monkeypatch: pytest.MonkeyPatch):
    model, parts = small.decoder(0), _small_parts()
    fast = compiled(model, "duo_llm", plan=Plan.of(model, ["duo_llm"], parts))
    card = by_the_card(model, parts, "router", "router")
    with torch.no_grad():
        fast(IDS, use_cache=False)
        card(IDS, use_cache=False)
        seen: list[int] = []
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda x, *rest: (x.dim() == 2 and seen.append(len(x)), linear(x, *rest))[1])
        fast(IDS, use_cache=False)
    routed = [int((layer.mlp.routes[0] == 2).sum()) for layer in card.model.layers]
    assert seen == [n for n in routed for _ in range(3) if n] and 0 < sum(routed) < 2 * 24


def test_fixed_layers_have_no_big_weights_and_are_packed():
    model, parts = small.decoder(0), _small_parts()
    sites = {"*.layers.0.mlp": {"route": "small"}, "*.layers.1.mlp": {"route": "skip"}}
    asked = {"name": "duo_llm", "sites": sites}
    fast = compiled(model, asked, "int8_weights", plan=Plan.of(model, [asked, "int8_weights"], parts))
    with torch.no_grad():
        want = by_the_card(model, parts, "small", "skip")(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 0.1
    took = accelpass.explain(fast).passes["duo_llm"].took
    assert [(d.bytes_before, d.bytes_after) for d in took.values()] == [
        (3 * 64 * 32 * 4, (3 * 4 * 32 + 32) * 4),
        (24576, 0),
    ]
    assert not any("mlp" in path and "layers.1" in path for path in accelpass.explain(fast).passes["int8_weights"].took)


@pytest.mark.slow
def test_calibration_fits_the_least_squares_and_answers_go_on():
    model = small.decoder(1)
    batches = [torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    plan = accelpass.calibrate(model, batches, [{"name": "duo_llm", "shrink": 4, "budget": 0.3}], progress=False)
    seen: list[tuple[Tensor, Tensor]] = []
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.register_forward_hook(lambda m, x, y: seen.append((x[0].flatten(0, 1), y.flatten(0, 1))))
    with torch.no_grad():
        for batch in batches:
            twin(batch, use_cache=False)
        x, y = (torch.cat(t) for t in zip(*seen, strict=True))
        mlp = model.model.layers[0].mlp
        hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        rows = (hidden.norm(dim=0) * mlp.down_proj.weight.norm(dim=0)).topk(16).indices.sort().values
        a = torch.cat([hidden[:, rows], torch.ones(len(x), 1)], 1)
        best = (a @ torch.linalg.lstsq(a.double(), y.double()).solution.float() - y).square().mean()
        part = {k.split("/")[-1]: t for k, t in plan.tensors.items() if "layers.0" in k}
        assert torch.equal(part["up"], mlp.up_proj.weight[rows])
        made = F.linear(F.silu(x @ part["gate"].T) * (x @ part["up"].T), part["down"], part["bias"])
        assert best <= (made - y).square().mean() < 1.05 * best
        fast = compiled(model, plan=plan)
        for prompt in (IDS[:1, :5], IDS[1:, :7]):
            cache = accelpass.KVCache(model, 16)
            whole = by_the_card(model, plan.tensors, "router", "router")(prompt, use_cache=False).logits
            fast(prompt[:, :-1], past_key_values=cache)
            assert relative_error(fast(prompt[:, -1:], past_key_values=cache).logits, whole[:, -1:]) < 1e-4


def loss_by_chance(model: Any, parts: dict[str, Tensor], text: Tensor, seeds: int) -> float:
    """The mean loss of the next token where each token of each layer goes through a size by chance."""
    made = by_the_card(model, parts, "big", "big")
    losses = []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        for layer in made.model.layers:
            duo = layer.mlp
            p = duo.parts
            drawn = torch.rand(text.shape, generator=draw) < 0.5

            def forward(x: Tensor, duo: Any = duo, p: Any = p, drawn: Tensor = drawn) -> Tensor:
                small_of = F.linear(F.silu(x @ p["gate"].T) * (x @ p["up"].T), p["down"], p["bias"])
                return torch.where(drawn[..., None], small_of, duo.big(x))

            duo.forward = forward
        logits = made(text, use_cache=False).logits
        losses.append(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())))
    return sum(losses) / seeds


@pytest.mark.slow
def test_joint_training_lowers_the_loss_of_mixed_sizes():
    model, draw = small.decoder(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        text = model.generate(torch.randint(0, 64, (8, 2), generator=draw), max_new_tokens=14, do_sample=False)
    torch.manual_seed(0)
    found = []
    for epochs in (0, 6):
        asked = {"name": "duo_llm", "shrink": 8, "joint": epochs}
        plan = accelpass.calibrate(model, list(text.split(2)), [asked], progress=False, validation=[text])
        found.append(plan.tensors)
    before, after = found
    assert before.keys() == after.keys() and all(before[k].shape == after[k].shape for k in before)
    router = "duo_llm/model.layers.0.mlp/router"
    assert torch.equal(before[router], after[router])
    with torch.no_grad():
        assert loss_by_chance(model, after, text, 6) < 0.95 * loss_by_chance(model, before, text, 6)


def test_routers_send_tokens_where_small_layers_err():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw)
    hard = (x[:, 0] > 0).float() * 2
    (router,) = fitted_router([x], [hard], target=0.5)
    big = (x @ router.T).argmax(-1)
    assert abs(float(big.float().mean()) - 0.5) < 0.1
    assert float(hard[big == 1].mean()) > 4 * float(hard[big == 0].mean())


def test_sums_are_those_of_all_tokens():
    hidden, down = torch.rand(9, 5), torch.randn(3, 5)
    sums = Sums.none(largest(hidden.norm(dim=0), down, 5), 3)
    for rows in hidden.split(4):
        sums.add(rows, down, torch.ones(3))
    weight, bias = sums.solved()
    assert relative_error(F.linear(hidden, weight, bias), F.linear(hidden, down, torch.ones(3))) < 1e-2


def test_what_does_not_fit_says_so():
    for bad, match in (
        ({"route": "huge"}, "big, small, skip, router"),
        ({"shrink": 1}, "2 or more"),
        ({"budget": 2.0}, "0 to 1"),
    ):
        with pytest.raises(accelpass.OptionError, match=match):
            make({"name": "duo_llm", **bad})
    model, other = small.decoder(0), {k: t[..., :3] for k, t in _small_parts().items()}
    with pytest.raises(Exception, match="the plan is not of this model"), torch.no_grad():
        compiled(model, "duo_llm", plan=Plan.of(model, ["duo_llm"], other))(IDS, use_cache=False)
    with pytest.raises(accelpass.PassError, match="found no MLP to make a small one of"):
        accelpass.calibrate(small.encoder(), [IDS], ["duo_llm"], progress=False)
    for made, why in ((model, "no small part"), (small.encoder(), "its first linear has a bias")):
        fast = compiled(made, "duo_llm")
        with torch.no_grad():
            fast(IDS)
        assert why in str(accelpass.explain(fast).passes["duo_llm"].skipped)


def test_a_file_computes_both_parts():
    from accelpass.backends.export.capture import bound, captured
    from accelpass.passes.core.base import Record

    model, record = small.decoder(0), Record("duo_llm")
    program = captured(model, bound(model, (IDS,), {"use_cache": False}), None).program
    program.artefacts.update(_small_parts())
    make("duo_llm").apply(program, record)
    assert len(record.took) == 2 and not any("expert_linear" in str(n.target) for n in program.graph.nodes)
