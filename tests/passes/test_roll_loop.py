"""Loops of one body: found by the parameters they share, compiled once, and ended when the state settles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.analyses.recurrence import loops
from accelpass.ir.core.capture import from_export
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from tests.sweep import examples


class Recurrent(nn.Module):
    """The card's: h = f(h, e), again and again; ``untied`` with a body of its own for each trip."""

    def __init__(
        self, trips: int, width: int = 16, untied: bool = False, collected: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trips, self.collected = trips, collected
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(trips if untied else 1))
        self.again = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            for linear in self.inner:
                linear.weight.mul_(0.3)

    def f(self, h: Tensor, e: Tensor, number: int) -> Tensor:
        return torch.tanh(self.inner[number % len(self.inner)](h) + self.again(e))

    def forward(self, x: Tensor) -> Any:
        h = e = x * 1.0
        states = []
        for number in range(self.trips):
            h = self.f(h, e, number)
            states.append(h)
        return (self.head(h), states) if self.collected else self.head(h)

    def rolled(self, x: Tensor, most: int, eps: float) -> tuple[Tensor, int]:
        h, n = x, 0
        while n < min(most, self.trips):
            g = self.f(h, x, n)
            n += 1
            old, new = (t.flatten(1 if t.dim() > 2 else 0) for t in (h, g))
            d = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)
            h = g
            if (d < eps).all():
                break
        return self.head(h), n


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="accelpass", options={"lowering": "eager", "passes": [{"name": "roll_loop", **options}]}
    )


def ran(fast: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """The result, and what each trip did."""
    from accelpass.backends.staged.graph import Call

    did: list[str] = []
    real = Call.run

    def noted(self: Any, number: int, action: str) -> None:
        did.append(action)
        real(self, number, action)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Call, "run", noted)
        return fast(x), did


@settings(max_examples=examples(2), deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 7), st.sampled_from([(5, 16), (3, 4, 16)]), st.sampled_from([0.0, 1e-2, 0.3])
)
def test_the_loop_is_the_cards(seed, trips, shape, eps):
    model, x = Recurrent(trips, seed=seed).eval(), torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    fast = compiled(model, exit_eps=eps)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        want, count = model.rolled(x, 32, eps)
        got, did = ran(fast, x, patch)
        torch.testing.assert_close(got, want)
        assert did == ["full"] * count + ["passed by"] * (trips - count)


def test_the_body_is_compiled_once_and_trips_are_limited(monkeypatch):
    model, x = Recurrent(9).eval(), torch.randn(2, 4, 16)
    fast = compiled(model, exit_eps=0.0, max_iter=4)
    got, did = ran(fast, x, monkeypatch)
    torch.testing.assert_close(got, model.rolled(x, 4, 0.0)[0])
    assert did == ["full"] * 4 + ["passed by"] * 5
    (report,) = (graph.report for graph in graphs_of(fast))
    assert report.parts_compiled <= 5 < report.parts  # in front, the body, the body passed by, behind
    exact = compiled(model, exit_eps=0.0)
    with torch.no_grad():
        torch.testing.assert_close(exact(x), model(x))
    for sizes in ((3, 4, 16), (3, 7, 16)):  # other sizes
        again = torch.randn(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(exact(again), model(again))


def program(model: nn.Module, *args: Tensor) -> Any:
    with torch.no_grad():
        return from_export(torch.export.export(model, args))


def test_loops_are_found_by_the_parameters_that_trips_share():
    x = torch.randn(3, 16)
    (loop,) = loops(program(Recurrent(6), x))
    assert loop.trips == 6 and len(loop.carried) == 7 and not loop.writes and not loop.inside
    assert loop.parameters == ("again.bias", "again.weight", "inner.0.bias", "inner.0.weight")
    assert len(loop.injected) == 1  # e is read again
    assert "6 trips" in str(loop)
    assert loops(program(Recurrent(6, untied=True), x)) == []
    assert loops(program(Recurrent(1), x)) == []
    assert loops(program(small.Mlp(16, 24), x)) == []
    (collected,) = loops(program(Recurrent(4, collected=True), x))
    assert collected.inside == (0, 1, 2)


@pytest.mark.slow
def test_a_tied_transformer_is_rolled(monkeypatch):
    """ALBERT: one layer, applied four times."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, ids = AlbertModel(config, add_pooling_layer=False).eval(), torch.randint(0, 40, (2, 9))
    fast = compiled(model, exit_eps=0.0, max_iter=3)
    with torch.no_grad():
        got, did = ran(lambda x: fast(x).last_hidden_state, ids, monkeypatch)
        config.num_hidden_layers = 3
        torch.testing.assert_close(got, AlbertModel.forward(model, ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert did == ["full"] * 3 + ["passed by"]


def test_refused():
    for options, why in (
        ({"exit_eps": -1.0}, "below 1"),
        ({"exit_eps": float("nan")}, "below 1"),
        ({"max_iter": 0}, "at least 1"),
    ):
        with pytest.raises(OptionError, match=why):
            make({"name": "roll_loop", **options})
    x = torch.randn(3, 16)
    for model, why in (
        (Recurrent(5, untied=True), "no parameters are read by several trips"),
        (Recurrent(5, collected=True), "states of single trips are returned"),
    ):
        fast = compiled(model.eval())
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
        (report,) = (graph.report for graph in graphs_of(fast))
        assert any(why in reason for record in report.records for reason in record.skipped.values())
    assert accelpass is not None
