"""Bisecting: a pass that is wrong at one site, harsh tolerances, NaN, passes that fail, and nothing to find."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import accelpass
import accelpass.passes.core.registry as registry
from accelpass.backends.debug.difference import relative_difference
from accelpass.cli.main import app
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.graph import aten, call
from accelpass.ir.errors import AccelpassError, OptionError, PassError
from accelpass.passes.core.base import Done, Pass, Skip
from tests.public.conftest import tiny_llama
from tests.small_models import Mlp, tiny_lm

IDS = torch.arange(6)[None]


@dataclass(frozen=True)
class Rescale(Pass):
    """Multiplies each linear by one, and the one at ``wrong`` by something else."""

    wrong: str = "layers.1.up_proj"
    factor: float = 3.0
    asks: bool = True

    name: ClassVar[str] = "rescale"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "for tests"

    def apply(self, program, record):
        for site in program.analysis(linears):
            if self.asks and isinstance(wanted := record.wants(site.path), Skip):
                record.skip(site.path, wanted.why)
                continue
            with program.graph.inserting_after(site.node):
                factor = self.factor if site.path == self.wrong else 1.0
                new = call(program.graph, site.node, aten.mul.Tensor, site.node, factor)
            site.node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            record.take(site.path, Done(f"times {factor}"))


@dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "for tests"

    def apply(self, program, record):
        raise ZeroDivisionError("as planned")


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    known = {**registry.registered(), "rescale": Rescale, "raises": Raises}
    for module in ("accelpass.passes.core.registry", "accelpass.passes.core.options"):
        monkeypatch.setattr(f"{module}.registered", lambda: known)


@pytest.mark.parametrize("wrong", ["layers.0.gate_proj", "lm_head"])
def test_the_wrong_site_of_the_wrong_pass_is_named(wrong):
    found = accelpass.bisect(tiny_lm(), ["int8_weights", Rescale(wrong)], (IDS,))
    assert (found.guilty, found.site) == ("rescale", wrong)
    assert [t.name for t in found.passes] == ["(no pass)", "rescale"] and "int8_weights" in found.left
    assert found.passes[0].difference < 1e-5 and found.before < 1e-5 < found.tolerance < found.alone
    assert len(found.tried) <= 4  # of 7 sites
    assert f'"skip_sites": {{"rescale": ["{wrong}"]}}' in found.next_step
    assert f"rescale departs first at {wrong} (before it:" in str(found) and "not reached" in str(found)


def test_what_it_says_to_type_next_helps():
    model = tiny_lm()
    found = accelpass.bisect(model, [Rescale()], {"ids": IDS})
    fast = accelpass.compile(model, [Rescale()], lowering="eager", skip_sites={found.guilty: [found.site]})
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS))
    report = accelpass.explain(fast).passes["rescale"]
    assert report.skipped == {found.site: "named in skip_sites"} and len(report.took) == 6


def test_int4_departs_under_a_harsh_tolerance_at_the_site_that_crosses_it():
    model, passes = tiny_lm(), [{"name": "int4_weights", "group_size": 32}]
    with torch.no_grad():
        dense = model(IDS)
        departs = relative_difference(dense, accelpass.compile(model, passes, lowering="eager")(IDS))
    assert departs > 0.01
    found = accelpass.bisect(model, passes, (IDS,), tolerance=departs * 0.7)
    assert found.guilty == "int4_weights" and found.site
    (with_it,) = [t for t in found.tried if t.name == found.site]
    assert found.before <= found.tolerance < with_it.difference
    assert found.accumulated == (found.alone <= found.tolerance)
    assert ("no single site is at fault" in str(found)) == found.accumulated
    first = accelpass.bisect(model, passes, (IDS,), tolerance=1e-6)
    assert (
        first.site == "layers.0.gate_proj"
    )  # the embedding is before it, and is packed with the output head or not at all


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nan_departs_under_any_tolerance(factor):
    found = accelpass.bisect(tiny_lm(), [Rescale("layers.0.up_proj", factor)], (IDS,), tolerance=1e9)
    assert (found.guilty, found.site) == ("rescale", "layers.0.up_proj")
    assert found.to_dict()["alone"] == "inf" and "inf (NaN" in str(found)
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_a_model_that_is_nan_itself_is_refused():
    model = tiny_lm()
    torch.nn.init.constant_(model.norm.bias, math.nan)
    with pytest.raises(AccelpassError, match="dense model's own output is NaN"):
        accelpass.bisect(model, ["int8_weights"], (IDS,))


def test_a_pass_that_fails_is_the_one():
    found = accelpass.bisect(tiny_lm(), ["int8_weights", Raises()], (IDS,))
    assert found.guilty == "raises" and found.site is None
    assert "ZeroDivisionError: as planned" in found.passes[-1].error and "leave raises out" in found.next_step


def test_a_pass_that_cannot_leave_sites_alone_is_named_without_one():
    found = accelpass.bisect(tiny_lm(), [Rescale(asks=False)], (IDS,))
    assert found.guilty == "rescale" and found.site is None
    assert "cannot leave single sites alone" in str(found)
    with torch.no_grad(), pytest.raises(Exception, match="cannot leave single sites alone") as raised:
        accelpass.compile(tiny_lm(), [Rescale(asks=False)], lowering="eager", skip_sites={"rescale": ["lm_head"]})(IDS)
    assert isinstance(raised.value.inner_exception, PassError)


def test_a_cache_starts_anew_in_each_trial():
    model = tiny_llama(1)

    def logits(one):
        cache = accelpass.KVCache(model, capacity=16)
        first = one(torch.arange(1, 9)[None], past_key_values=cache, logits_to_keep=1).logits
        return first, one(torch.tensor([[3]]), past_key_values=cache, logits_to_keep=1).logits

    found = accelpass.bisect(model, [{"name": "kv_window", "budget": 0.3, "sinks": 1}], logits, tolerance=0.02)
    assert (found.guilty, found.site) == ("kv_window", "model.layers.0.self_attn")
    assert found.passes[0].difference < 1e-5  # a cache that the trial before had filled would have been refused


def test_the_model_is_as_it_was():
    model = Mlp().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 64)
    accelpass.bisect(model, ["int8_weights"], (x,), options={"free_weights": True})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        fast = accelpass.compile(model, ["int8_weights"], lowering="eager")
        assert (fast(x) - model(x)).abs().max() < 0.05


def test_a_compiled_model_is_compared_with_what_was_compiled():
    model = tiny_lm()
    model.compile(backend="accelpass", options={"passes": [Rescale()], "lowering": "eager"})
    with torch.no_grad():
        wrong = model(IDS)
    given = torch.compile(model, backend="accelpass", options={"lowering": "eager"})
    assert accelpass.bisect(given, [Rescale()], (IDS,)).site == "layers.1.up_proj"
    with torch.no_grad():
        assert torch.equal(model(IDS), wrong)


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="tolerance=-1"):
        accelpass.bisect(tiny_lm(), [], (IDS,), tolerance=-1)
    with pytest.raises(OptionError, match="did you mean 'int8_weights'"):
        accelpass.bisect(tiny_lm(), ["int8_weight"], (IDS,))
    for wrong in ({"int8_weights": "lm_head"}, ["lm_head"], {"int8_weight": ["lm_head"]}):
        with pytest.raises(OptionError, match="skip_sites"):
            accelpass.compile(tiny_lm(), ["int8_weights"], skip_sites=wrong)


@pytest.mark.parametrize(
    ("name", "site"),
    [("cpu_gemv", "layers.0.gate_proj"), ("horizontal_fusion", "layers.0.{gate_proj,up_proj}")],
)
def test_passes_without_patterns_leave_sites_alone_too(name, site):
    given = {"name": name} | ({"copy_weights": True} if name == "horizontal_fusion" else {})
    fast = accelpass.compile(tiny_lm(), [given], lowering="eager", skip_sites={name: [site]})
    with torch.no_grad():
        fast(torch.arange(1)[None])
    report = accelpass.explain(fast).passes[name]
    assert report.skipped[site] == "named in skip_sites" and site not in report.took


@pytest.mark.slow
def test_command(monkeypatch):
    class Tokenizer:
        chat_template = None

        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[ord(c) for c in text[:8]]])}

    monkeypatch.setattr("accelpass.models_zoo.resolve", lambda name, dtype: (tiny_llama(1), Tokenizer()))
    words = ["bisect", "tiny", "--passes", "int8_weights,int4_weights:group_size=32", "--tokens", "1", "--json"]
    done = CliRunner().invoke(app, [*words, "--tolerance", "0.000001"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["guilty"] == "int8_weights" and data["site"].startswith("model.") and "skip_sites" in data["next"]
    calm = CliRunner().invoke(app, ["bisect", "tiny", "--passes", "none", "--tokens", "2"])
    assert calm.exit_code == 0 and "nothing departs by more than 0.05: 0 passes" in calm.stdout
    assert CliRunner().invoke(app, ["bisect", "tiny", "--passes", "int8"]).exit_code == 2
