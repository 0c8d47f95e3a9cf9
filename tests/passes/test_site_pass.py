"""The loop of passes that rewrite sites: order and conflicts by aspect, sites left alone, answers that are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import accelpass
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.core.graph import aten, replace, value
from accelpass.ir.errors import OptionError
from accelpass.passes import Done, SitePass, Skip, Take
from accelpass.passes.core.manager import ordered
from tests.small_models import Mlp


@dataclass(frozen=True)
class Doubled(SitePass):
    """Doubles what each linear gives, with no branch for anything but what it does."""

    name: ClassVar[str] = "doubled"
    phase: ClassVar[str] = "weights"
    summary: ClassVar[str] = "for tests"
    edits: ClassVar[frozenset[str]] = frozenset({"linear.size"})
    factor: float = 2.0

    def find(self, program: Any) -> list[Linear]:
        return program.analysis(linears)

    def rewrite(self, site: Linear, edit: Any) -> Done:
        new = edit.call(site.node.next, aten.mul.Tensor, site.node, self.factor)
        site.node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return Done("doubled")


@dataclass(frozen=True)
class Tripled(Doubled):
    name: ClassVar[str] = "a_tripled"
    factor: float = 3.0


@dataclass(frozen=True)
class Reader(Doubled):
    name: ClassVar[str] = "a_reader"
    edits: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"linear.size"})


@dataclass(frozen=True)
class Bare(Doubled):
    name: ClassVar[str] = "bare"

    def check(self, site: Linear, program: Any) -> Any:
        return site.out_features > 0


@dataclass(frozen=True)
class Refusing(Doubled):
    name: ClassVar[str] = "refusing"

    def check(self, site: Linear, program: Any) -> Any:
        return Skip("it is a gate") if site.path == "gate_proj" else Take()


@dataclass(frozen=True)
class Prompts(Doubled):
    name: ClassVar[str] = "prompts"
    claims: ClassVar[dict[str, str]] = {"calls": "a prompt is read once"}


@dataclass(frozen=True)
class Steps(Reader):
    name: ClassVar[str] = "steps"
    claims: ClassVar[dict[str, str]] = {"calls": "steps follow one another"}


def ran(*passes: Any) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    model = Mlp().eval()
    options = {"lowering": "eager", "passes": list(passes)}
    fast = torch.compile(model, backend="accelpass", options=options)
    with torch.no_grad():
        made = fast(torch.ones(2, 64))
    return made, accelpass.explain(fast)


def test_two_editors_of_one_aspect_are_refused_with_both_names() -> None:
    with pytest.raises(
        Exception, match=r"'doubled' and 'a_tripled' cannot both have \w+: each edits linear\.size.*exclude="
    ):
        ran(Tripled(), Doubled())


def test_each_may_have_sites_of_its_own() -> None:
    _, report = ran(Tripled(include=("gate_proj",)), Doubled(exclude=("gate_proj",)))
    assert list(report.passes["a_tripled"].took) == ["gate_proj"] and "gate_proj" not in report.passes["doubled"].took


def test_who_reads_an_aspect_runs_after_who_edits_it() -> None:
    assert [p.name for p in ordered([Reader(), Doubled()])] == ["doubled", "a_reader"]


def test_what_passes_assume_of_the_model_is_compared() -> None:
    with pytest.raises(OptionError, match=r"prompts cannot be used with steps: .* read once; .* follow one another"):
        ordered([Steps(), Prompts()])


def test_a_condition_that_is_no_verdict_is_named() -> None:
    with pytest.raises(Exception, match=r"check\(\) of bare returned True for \w+; return Take\(\) or Skip"):
        ran(Bare())


def test_sites_are_left_out_by_the_user_and_by_the_pass() -> None:
    dense, _ = ran()
    made, report = ran(Refusing(exclude=("up_proj",), sites={"down_proj": {"factor": 1.0}}))
    told = report.passes["refusing"]
    assert told.skipped == {"gate_proj": "it is a gate", "up_proj": "named in exclude=['up_proj']"}
    assert list(told.took) == ["down_proj"]
    torch.testing.assert_close(made, dense)


def test_a_model_without_a_site() -> None:
    fast = torch.compile(nn.ReLU().eval(), backend="accelpass", options={"lowering": "eager", "passes": [Doubled()]})
    with torch.no_grad():
        fast(torch.ones(2, 2))
    assert "was found in this graph" in accelpass.explain(fast).passes["doubled"].skipped["model"]


def test_readers_of_a_replaced_value_know_how_it_lies() -> None:
    graph = fx.symbolic_trace(lambda x: x).graph
    with torch._subclasses.FakeTensorMode() as mode:
        wide, narrow = mode.from_tensor(torch.empty(3, 8)), mode.from_tensor(torch.empty(3, 4))
    (x,) = graph.find_nodes(op="placeholder")
    x.meta["val"] = wide
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        old = graph.call_function(aten.alias.default, (x,))
        part = graph.call_function(aten.slice.Tensor, (x, 1, 4, 8))
        view = graph.call_function(aten.view.default, (old, [3, 2, 2]))
        flat = graph.call_function(aten.view.default, (view, [12]))
    with mode:
        old.meta["val"], view.meta["val"], flat.meta["val"] = narrow, narrow.view(3, 2, 2), narrow.view(12)
        part.meta["val"] = wide[:, 4:]
    output.args = ((view, flat),)
    replace(old, part)
    assert value(view).stride() == (8, 2, 1) and value(view).storage_offset() == 4
    assert flat.target is aten.reshape.default and value(flat).stride() == (1,)
