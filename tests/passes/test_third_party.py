"""Packages whose passes misbehave: each is named with its package, the model is untouched, all other passes work."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

import accelpass
from accelpass.ir.errors import GraphError, OptionError, PassError
from accelpass.passes.core import registry
from tests.small_models import relative_error, tiny_lm

IDS = torch.arange(12).reshape(2, 6)
HEAD = """
from dataclasses import dataclass
from typing import ClassVar
from accelpass.ir.core.graph import aten, call
from accelpass.passes import Done, Pass

@dataclass(frozen=True)
class Acme(Pass):
    name: ClassVar[str] = "acme"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "for tests"
    exact: ClassVar[bool] = True
"""
APPLY = """
    def apply(self, program, record):
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            record.skip(node.name, "left alone")
"""


class Packages:
    """Packages with one pass each, installed in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, code: str, package: str = "acme-passes", entry: str = "acme", target: str = "Acme") -> None:
        module = package.replace("-", "_")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(code))
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[accelpass.passes]\n{entry} = {module}:{target}\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_BROKEN", {})
    registry.registered.cache_clear()
    before = set(sys.modules)
    yield Packages(tmp_path)
    registry.registered.cache_clear()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def compiled(model, *passes):
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": list(passes)})


def others_work() -> None:
    model = tiny_lm()
    with torch.no_grad():
        assert 0 < relative_error(compiled(model, "int8_weights")(IDS), model(IDS)) < 0.1
    assert accelpass.compile(model, ["h2o"]) is not None


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import oddities",
            r"cannot be loaded: ModuleNotFoundError: No module named 'oddities'.*or remove acme-passes",
        ),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("Acme = object", "is not an accelpass Pass"),
        ("Other = 3", "cannot be loaded: AttributeError"),
        (HEAD, r"Acme does not define apply\(self, program, record\)"),
        (HEAD.replace('"fusion"', '"fuson"') + APPLY, r"phase 'fuson' \(did you mean 'fusion'\?\); phases: structure"),
        (HEAD.replace("@dataclass(frozen=True)", "") + APPLY, "not a frozen dataclass"),
        (HEAD.replace('name: ClassVar[str] = "acme"', "") + APPLY, "Acme has no name"),
        (HEAD.replace('"acme"', '"Acme 2"') + APPLY, "'Acme 2' is not a name for a pass"),
        (
            HEAD.replace('"acme"', '"other"') + APPLY,
            "entry point 'acme' of acme-passes is for a pass that is named 'other'",
        ),
        (
            HEAD.replace(
                "import Done, Pass", "import Done, Pass\nfrom accelpass.passes.kv_cache.base import KVPass"
            ).replace("(Pass)", "(KVPass)"),
            "does not define edited",
        ),
    ],
    ids=lambda v: v[:24].strip() if "\n" not in v else None,
)
def test_a_pass_that_cannot_be_used(packages, code, says):
    packages.add(code)
    with pytest.warns(UserWarning, match=says) as warned:
        assert "int8_weights" in accelpass.passes.core.registry.registered()
    assert (
        len(warned) == 1
        and "acme-passes" in str(warned[0].message)
        and "All other passes work" in str(warned[0].message)
    )
    with pytest.raises(OptionError, match=says) as caught:
        accelpass.compile(tiny_lm(), ["acme"])
    assert "acme-passes" in str(caught.value)
    others_work()


def test_one_of_our_names_stays_ours(packages):
    packages.add(HEAD.replace('"acme"', '"int8_weights"') + APPLY, entry="int8_weights")
    with pytest.warns(UserWarning, match="'int8_weights' of acme-passes is left out: accelpass has one of that name"):
        found = registry.registered()
    assert found["int8_weights"].__module__ == "accelpass.passes.quantization.int8_weights"
    others_work()


def test_two_packages_with_one_name_are_both_left_out(packages):
    packages.add(HEAD + APPLY, package="acme-passes")
    packages.add(HEAD + APPLY, package="best-passes")
    says = "the pass name 'acme' is registered by acme-passes and by best-passes; uninstall one of them"
    with pytest.warns(UserWarning, match=says):
        assert "acme" not in registry.registered()
    with pytest.raises(OptionError, match=says):
        registry.make("acme")
    others_work()


def failing(packages, code: str, kind: type[Exception], says: str) -> None:
    packages.add(HEAD + textwrap.indent(textwrap.dedent(code), "    "))
    model = tiny_lm()
    held = {name: t.clone() for name, t in model.state_dict().items()}
    want = model(IDS).detach()
    with torch.no_grad():
        with pytest.raises(Exception, match=says) as caught:
            compiled(model, "acme")(IDS)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), kind)
        assert "It comes from acme-passes; leave it out of passes=" in str(caught.value)
        assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
        assert torch.equal(model(IDS), want)
        assert relative_error(compiled(model)(IDS), want) < 1e-6
    others_work()


def test_a_pass_that_raises(packages):
    code = """
    def apply(self, program, record):
        raise IndexError("seven")
    """
    failing(packages, code, PassError, "the pass 'acme' failed: IndexError: seven.* It comes")


@pytest.mark.parametrize("records", [True, False])
def test_a_pass_that_breaks_the_graph(packages, records):
    """Also one that forgets to record what it did."""
    code = f"""
    def apply(self, program, record):
        (output,) = program.graph.find_nodes(op="output")
        node = output.args[0][0]
        with program.graph.inserting_before(output):
            new = call(program.graph, node, aten.unsqueeze.default, node, 0)
        output.args = ((new,),)
        if {records}:
            record.take("output", Done("broken"))
    """
    failing(packages, code, GraphError, "after acme: broken rule: shapes and dtypes of the outputs stay")


def test_a_pass_whose_options_raise(packages):
    packages.add(HEAD + "    size: int = 0\n    def __post_init__(self):\n        1 // self.size\n" + APPLY)
    with pytest.raises(
        OptionError, match=r"the pass 'acme' does not take \{\}: ZeroDivisionError.*It comes from acme-passes"
    ):
        accelpass.compile(tiny_lm(), ["acme"])
    assert registry.make({"name": "acme", "size": 2}).size == 2


def test_a_pass_object_that_is_none(packages):
    packages.add(HEAD.replace('"fusion"', '"fuson"') + APPLY)
    import acme_passes  # type: ignore[import-not-found]

    with pytest.raises(OptionError, match="did you mean 'fusion'"):
        accelpass.compile(tiny_lm(), [acme_passes.Acme()])


def test_a_good_package_is_used(packages):
    packages.add(HEAD + APPLY)
    model = tiny_lm()
    with torch.no_grad():
        fast = compiled(model, "acme")
        assert relative_error(fast(IDS), model(IDS)) < 1e-6
    assert accelpass.explain(fast).passes["acme"].skipped == {"silu": "left alone", "silu_1": "left alone"}
    assert registry.package_of(registry.registered()["acme"]) == "acme-passes"
