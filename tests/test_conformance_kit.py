"""The conformance kit finds what is wrong with a pass, and nothing wrong with ours."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import OptionError
from accelpass.passes.core.base import Done, Pass
from accelpass.passes.core.registry import registered
from accelpass.testing import NotConforming, check_pass
from accelpass.testing.trial import difference
from tests.packing import pack_int8
from tests.pass_settings import SETTINGS, names, setting


@dataclass(frozen=True)
class OnSilu(Pass):
    """Base of the passes below: does something behind each silu."""

    name: ClassVar[str] = "on_silu"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "for tests"
    identity: ClassVar[dict[str, Any] | None] = {"scale": 1.0}
    scale: float = 2.0

    def apply(self, program, record):
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            with program.graph.inserting_after(node):
                new = self.insert(program, node)
            node.replace_all_uses_with(
                new, delete_user_cb=lambda user, new=new: user is not new and not made_of(new, user)
            )
            record.take(node.name, Done("scaled"))

    def insert(self, program, node):
        return call(program.graph, node, aten.mul.Scalar, node, self.scale)


def made_of(new, user) -> bool:
    """Whether ``user`` is a step on the way to ``new``."""
    return user in new.all_input_nodes or any(user in n.all_input_nodes for n in new.all_input_nodes)


def scaled(model, p):
    """The same, eagerly."""

    def forward(layer, x):
        return x + layer.down_proj(p.scale * F.silu(layer.gate_proj(x)) * layer.up_proj(x))

    for layer in model.layers:
        layer.forward = lambda x, layer=layer: forward(layer, x)
    return model


ALONE = ("identity", "graph", "report", "causality", "leakage", "recompiles", "gradients", "export")


def kit(given: Any, *checks: str, **more: Any):
    return check_pass(given, models=["mlp"], checks=checks, raising=False, **more)


def test_a_right_pass_conforms():
    made = kit(OnSilu, *ALONE, "oracle", oracle=scaled, examples=3)
    assert made.ok, str(made)
    assert {f.check for f in made.findings} == {*ALONE, "oracle"}
    assert all(f.status == "passed" for f in made.findings), str(made)


@dataclass(frozen=True)
class Wrong(OnSilu):
    """Not the dense model at its identity setting, nor what the oracle says."""

    def insert(self, program, node):
        return call(program.graph, node, aten.mul.Scalar, node, self.scale * 1.1)


@dataclass(frozen=True)
class Averaging(OnSilu):
    """Each token sees the mean of all."""

    def insert(self, program, node):
        mean = call(program.graph, node, aten.mean.dim, node, [1], True)
        with program.graph.inserting_after(mean):
            return call(program.graph, node, aten.add.Tensor, node, mean)


CALLS: list[int] = []


def counted(x):
    """Remembers, in a list that belongs to no model, how often it was called."""
    CALLS.append(1)
    return x + len(CALLS) / 8


@dataclass(frozen=True)
class Counting(OnSilu):
    def insert(self, program, node):
        return call(program.graph, node, counted, node)


@dataclass(frozen=True)
class Baking(OnSilu):
    """Takes numbers from the weights when it compiles, and bakes them in."""

    def insert(self, program, node):
        weight = program.tensors.value(node.args[0].args[1])
        return call(program.graph, node, aten.mul.Scalar, node, 10 * float(weight[0, 0]))


@dataclass(frozen=True)
class Specialising(OnSilu):
    """Makes a number of a symbolic size."""

    def insert(self, program, node):
        return call(program.graph, node, aten.mul.Scalar, node, 1.0 / int(value(node).shape[1]))


@dataclass(frozen=True)
class Raising(OnSilu):
    def insert(self, program, node):
        raise IndexError("seven")


@dataclass(frozen=True)
class Lying(OnSilu):
    """Takes the last token alone, and says that it is all of them."""

    def insert(self, program, node):
        new = program.graph.call_function(aten.slice.Tensor, (node, 1, -1))
        new.meta["val"] = value(node)
        return new


@dataclass(frozen=True)
class Valueless(OnSilu):
    """A node without a fake value."""

    def insert(self, program, node):
        return program.graph.call_function(aten.mul.Scalar, (node, self.scale))


@dataclass(frozen=True)
class Boasting(OnSilu):
    """Says that it is exact."""

    exact: ClassVar[bool] = True


@dataclass(frozen=True)
class Silent(OnSilu):
    """Rewrites and tells nobody."""

    def apply(self, program, record):
        super().apply(program, type(record)(self.name))


@dataclass(frozen=True)
class Idle(OnSilu):
    """Tells of what it does not do."""

    def apply(self, program, record):
        record.take("silu", Done("scaled"))


@dataclass(frozen=True)
class Wordless(OnSilu):
    def apply(self, program, record):
        super().apply(program, record)
        record.skip("embed", "")


@dataclass(frozen=True)
class Fickle(OnSilu):
    """Another code each time."""

    made: ClassVar[list[int]] = []

    def insert(self, program, node):
        self.made.append(1)
        return call(program.graph, node, aten.mul.Scalar, node, 1.0 + len(self.made) / 64)


@dataclass(frozen=True)
class Nowhere(OnSilu):
    def apply(self, program, record):
        record.skip("model", "it has no convolution")


@dataclass(frozen=True)
class OneDoor(OnSilu):
    """Another thing for an exported program."""

    def insert(self, program, node):
        return call(program.graph, node, aten.mul.Scalar, node, 3.0 if program.frontend == "export" else 2.0)


@dataclass(frozen=True)
class Writing(OnSilu):
    """Changes the model's own weight."""

    def insert(self, program, node):
        program.tensors.value(node.args[0].args[1]).mul_(1.5)
        return super().insert(program, node)


CASES = [
    (Wrong, "identity", "the rewrite at sites silu", 1e-3),
    (Raising, "identity", "on_silu: test_conformance_kit.py:", None),
    (Lying, "graph", "meta['val']", None),
    (Valueless, "graph", "the nodes that apply", None),
    (Silent, "graph", "record.take", None),
    (Idle, "graph", "take() a site only when", None),
    (Fickle, "graph", "order is chance", None),
    (Boasting, "report", "exact: ClassVar", 1e-2),
    (Wordless, "report", "record.skip", None),
    (Nowhere, "report", "options= at which it works", None),
    (Averaging, "causality", "reductions over the token axis", 1e-2),
    (Counting, "leakage", "what outlives a call", 1e-2),
    (Baking, "leakage", "program.tensors.derive", 1e-4),
    (Writing, "leakage", "in-place writes", None),
    (Specialising, "recompiles", "symbolic size", None),
    (Boasting, "gradients", "is not exact", 1e-2),
    (OneDoor, "export", "both doors", 1e-2),
]


@pytest.mark.parametrize(("kind", "check", "look_at", "error"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_each_check_finds_what_is_wrong(kind, check, look_at, error):
    (found,) = kit(kind, check).failures
    assert (found.check, found.status) == (check, "failed")
    assert look_at in found.look_at, found
    assert found.error is None if error is None else found.error > error, found


def test_the_oracle_check_tells_the_simplest_shape_and_what_differs():
    (found,) = kit(Wrong, "oracle", oracle=scaled, examples=3).failures
    assert "at batch 1, length 2, seed 0, the simplest that differs" in found.what
    assert found.error > 1e-3
    (found,) = kit(Nowhere, "oracle", oracle=scaled, examples=1).failures
    assert "(no site was taken)" in found.look_at
    (found,) = kit(Nowhere, "oracle", oracle=lambda model, p: model, examples=1).failures
    assert "took no site, so nothing was compared" in found.what


def test_a_failure_is_raised_with_all_that_helps():
    with pytest.raises(NotConforming) as caught:
        check_pass(Wrong, models=["mlp"], checks=["identity", "report"])
    text = str(caught.value)
    assert "the pass 'on_silu' does not conform: 1 checks failed" in text
    assert "at {'scale': 1.0}, outputs against the dense model's, 2 sites taken; they differ by" in text
    assert "look at: the rewrite at sites silu" in text
    table = str(kit(Wrong, "identity", "report"))
    assert "1 passed, 1 failed, 0 skipped" in table and "look at:" in table


@dataclass(frozen=True)
class Quiet(OnSilu):
    """Refuses its neighbour without its name."""

    name: ClassVar[str] = "quiet"
    phase: ClassVar[str] = "schedule"

    def apply(self, program, record):
        if any(n.target is aten.mul.Scalar for n in program.graph.nodes):
            raise OptionError("quiet wants a graph of its own")
        record.skip("model", "nothing to do")


@dataclass(frozen=True)
class Polite(OnSilu):
    name: ClassVar[str] = "polite"
    excludes: ClassVar[dict[str, str]] = {"on_silu": "both scale"}


@dataclass(frozen=True)
class Doubling(OnSilu):
    """Wrong beside a pass that has scaled already."""

    name: ClassVar[str] = "doubling"
    phase: ClassVar[str] = "schedule"

    def insert(self, program, node):
        seen = any(n.target is aten.mul.Scalar for n in program.graph.nodes)
        return call(program.graph, node, aten.mul.Scalar, node, self.scale * (1.5 if seen else 1.0))


def test_composition_is_right_or_refused_by_both_names():
    made = kit(OnSilu, "composition", others=[Polite, Quiet, Doubling, "int8_weights", "cpu_gemv"])
    found = {f.subject: f for f in made.findings}
    assert found["int8_weights"].status == found["cpu_gemv"].status == "passed"
    assert (
        found["polite"].status == "passed" and "polite cannot be used with on_silu: both scale" in found["polite"].what
    )
    assert found["quiet"].status == "failed" and "a graph of its own" in found["quiet"].what
    assert found["doubling"].status == "failed" and found["doubling"].error > 1e-2
    assert "passes=['on_silu', 'doubling'] on the mlp" in found["doubling"].what


def test_state_that_is_declared_and_reset_is_no_leak():
    @dataclass(frozen=True)
    class Declared(OnSilu):
        def insert(self, program, node):
            calls = program.tensors.state(node.args[0].args[1], StateSpec("calls", (1,), torch.float32, "sequence"))
            step = call(program.graph, node, aten.add_.Scalar, calls, 1.0)
            with program.graph.inserting_after(step):
                return call(program.graph, node, aten.mul.Tensor, node, step)

    (found,) = kit(Declared, "leakage").findings
    assert found.status == "passed" and "accelpass.reset() between" in found.what, found


def test_mistakes_in_the_call_are_named():
    with pytest.raises(OptionError, match=r"no check 'oracel' \(did you mean 'oracle'\?\)"):
        check_pass(OnSilu, checks=["oracel"])
    with pytest.raises(OptionError, match=r"no model 'decodr' \(did you mean 'decoder'\?\)"):
        check_pass(OnSilu, models=["decodr"])
    with pytest.raises(OptionError, match="unknown option 'scal'"):
        check_pass(OnSilu, options={"scal": 1.0})
    with pytest.raises(OptionError, match="did you mean 'int8_weights'"):
        check_pass("int8_weigths")
    with pytest.raises(NotConforming, match="every check was skipped"):
        check_pass("int8_weights", models=["mlp"], checks=["identity", "oracle"])


def test_the_kit_is_imported_lazily():
    code = (
        "import sys, accelpass.testing as t; assert not {'torch', 'pytest', 'hypothesis'} & set(sys.modules); "
        "from accelpass.testing import check_pass; assert not {'pytest', 'hypothesis', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def rounded(model, p):
    """int8 weights, eagerly."""
    done = set()
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and id(weight) not in done:
            done.add(id(weight))
            q, scale = pack_int8(weight)
            weight.copy_(q * scale[:, None])
    return model


def test_a_registered_pass_conforms():
    assert check_pass("int8_weights", models=["mlp"], oracle=rounded, examples=2, others=["int4_weights"]).ok


@dataclass(frozen=True)
class IdleAtIdentity(OnSilu):
    name: ClassVar[str] = "idle"

    def apply(self, program, record):
        if self.scale == 1.0:
            record.skip("mlp", "nothing to scale")
        else:
            super().apply(program, record)


def test_a_pass_that_takes_nothing_at_its_identity_is_composed_elsewhere():
    (idle,) = kit(IdleAtIdentity, "composition", others=["int8_weights"]).of("composition")
    assert idle.status == "skipped" and "no pair would run: give composed_at=" in idle.what
    (made,) = kit(
        IdleAtIdentity, "composition", others=["int8_weights"], composed_at={"scale": 1.05}, options={"scale": 1.05}
    ).of("composition")
    assert made.status == "passed" and "both rewrite one model" in made.what
    with pytest.raises(OptionError, match="scal"):
        kit(IdleAtIdentity, "composition", composed_at={"scal": 1.0})


def test_every_registered_pass_has_a_setting():
    assert set(SETTINGS) == {name for name, kind in registered().items() if kind.__module__.startswith("accelpass.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_registered_pass_conforms(name):
    """The oracles of ours are in their own tests, and pairs in the composition matrix."""
    s = setting(name)
    made = check_pass(
        name,
        options=s.options,
        identity=s.identity,
        models=s.models,
        checks=ALONE,
        tensors=s.tensors,
        looks_ahead=s.looks_ahead,
        recompiles=s.recompiles,
        tolerance=s.tolerance,
        raising=False,
    )
    assert made.ok, str(made)


def test_the_oracle_gets_a_copy():
    seen = []

    def spoiling(model, p):
        seen.append(copy.copy(model.embed.weight))
        with torch.no_grad():
            model.embed.weight.zero_()
        return model

    (found,) = kit("int8_weights", "oracle", oracle=spoiling, examples=1).failures
    assert (seen[0].data.abs().sum() == 0 and found.error == float("inf")) or found.error > 1


def test_an_infinity_that_both_have_is_no_difference():
    gone = float("-inf")
    assert difference([torch.tensor([gone, 2.0])], [torch.tensor([gone, 1.0])]) == 1.0
    assert difference([torch.tensor([gone, 2.0])], [torch.tensor([2.0, gone])]) == float("inf")
    assert difference([torch.tensor([-gone])], [torch.tensor([gone])]) == float("inf")
    assert difference([torch.tensor([float("nan")])], [torch.tensor([float("nan")])]) == float("inf")
