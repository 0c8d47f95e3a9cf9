"""Debug mode: what it writes, that it stands by itself, and what it says where it cannot measure."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import accelpass
from accelpass.backends.debug.debug_mode import _run_folder
from accelpass.backends.debug.difference import largest_difference, relative_difference
from accelpass.backends.debug.graph_code import inputs_said, listing
from accelpass.backends.debug.graph_diff import counted, hunks
from accelpass.ir.core.capture import from_export
from accelpass.ir.core.graph import aten, call
from accelpass.ir.errors import PassError
from accelpass.passes.core.base import Done, Pass
from tests.public.conftest import tiny_llama
from tests.small_models import tiny_lm


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The variable alone turns debug mode on."""
    monkeypatch.setenv("ACCELPASS_DEBUG", str(tmp_path))
    _run_folder.cache_clear()
    return tmp_path


def compiled(model, *passes, **options):
    given = {"passes": list(passes), "lowering": "eager", **options}
    return torch.compile(model, backend="accelpass", options=given)


def graphs(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(folder.rglob("graph.json"))]


def assert_stands_alone(folder: Path) -> None:
    """Code is Python, pages need no network, and what they link to is there."""
    for code in folder.rglob("*.py"):
        ast.parse(code.read_text())
    for page in folder.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        for link in re.findall(r'href="([^"]+)"', text):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_variable_alone_writes_each_pass_and_its_diff(folder):
    fast = compiled(tiny_lm(), "int8_weights", "horizontal_fusion")
    with torch.no_grad():
        fast(torch.arange(4)[None])
    (run,) = folder.glob("run-*")
    written = {p.name for p in (run / "graph-001").iterdir()}
    assert {f"01-int8_weights{s}" for s in (".before.py", ".after.py", ".html")} <= written
    assert "02-horizontal_fusion.html" in written and not any("cpu_gemv" in name for name in written)
    assert_stands_alone(folder)

    before, after = ((run / "graph-001" / f"01-int8_weights.{s}.py").read_text() for s in ("before", "after"))
    assert 'ids: "i64[1, 4]"' in before and "# param layers.0.gate_proj.weight" in before
    assert re.search(r"linear = aten\.linear\(embedding, layers_0_gate_proj_weight\) +# f32\[1, 4, 96\]", before)
    assert "accelpass.linear(" in after and "    # layers.1.down_proj\n" in after

    page = (run / "graph-001" / "01-int8_weights.html").read_text()
    assert "<mark>" in page and "layers.1.down_proj" in page
    index = (folder / "index.html").read_text()
    assert f"{run.name}/graph-001/01-int8_weights.html" in index
    (graph,) = graphs(folder)
    rows = {row["name"]: row for row in graph["passes"]}
    assert rows["int8_weights"]["took"] == 8 and float(rows["int8_weights"]["difference"]) > 0
    assert rows["horizontal_fusion"]["took"] == 2 and rows["cpu_gemv"]["page"] == ""
    assert rows["lowering"]["difference"] == "0"

    report = accelpass.explain(fast)
    assert 0 < report.passes["int8_weights"].difference < 0.05
    assert "changed the outputs by" in str(report) and str(folder / "index.html") in report.notes[0]


def test_the_option_alone_writes_to_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELPASS_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        compiled(tiny_lm(), "int8_weights", debug=True)(torch.arange(4)[None])
    assert (tmp_path / "accelpass-debug" / "index.html").exists()


def test_without_either_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELPASS_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        compiled(tiny_lm(), "int8_weights")(torch.arange(4)[None])
    assert list(tmp_path.iterdir()) == []


def test_attention_is_told_in_words_and_a_later_graph_says_that_it_was_not_measured(folder):
    model = tiny_llama(1)
    fast = compiled(model, {"name": "h2o", "budget": 0.5})
    cache = accelpass.KVCache(model, capacity=16)
    with torch.no_grad():
        fast(torch.arange(1, 9)[None], past_key_values=cache, logits_to_keep=1)
        fast(torch.tensor([[3]]), past_key_values=cache, logits_to_keep=1)
    prompt, decode = graphs(folder)
    assert prompt["unmeasured"] == "" and "what earlier steps" in decode["unmeasured"]
    assert {row["difference"] for row in decode["passes"]} == {"not measured"}
    assert any("differences were not measured" in note for note in accelpass.explain(fast).notes)
    (before,) = folder.rglob("graph-001/*h2o.before.py")
    (after,) = folder.rglob("graph-001/*h2o.after.py")
    assert "# self attention of model.layers.0.self_attn: 2 query heads share a key/value head" in before.read_text()
    assert "keeps" not in before.read_text() and re.search(r"#   keeps .*\[h2o\]", after.read_text())
    assert "scores = q @ k^T * 0.25" in before.read_text()
    assert_stands_alone(folder)


def test_passes_across_steps_are_written_for_each_variant(folder):
    from accelpass.models_zoo import tiny_diffusers
    from tests.passes.step_truth import denoise

    model, call_with = tiny_diffusers.build("dit")
    fast = compiled(model.eval(), {"name": "delta_cache", "start": 0, "interval": 2})
    denoise(fast, call_with, [2, 1])
    made = graphs(folder)
    assert len(made) > 1 and all("what earlier steps" in g["unmeasured"] for g in made)
    assert any("delta_cache" in g["variant"] for g in made)
    assert list(folder.rglob("*delta_cache.html"))
    (note,) = [n for n in accelpass.explain(fast).notes if "debug" in n]
    assert note.count("graphs and diffs") == 1 and "differences were not measured" in note
    assert_stands_alone(folder)


@pytest.mark.slow
def test_a_prompt_whose_tokens_are_dropped_is_measured_and_what_takes_them_up_is_not(folder):
    model = tiny_llama(2)
    fast = compiled(model, {"name": "lazyllm", "keep": [0.5], "layers": [0]})
    cache = accelpass.KVCache(model, capacity=16)
    with torch.no_grad():
        fast(torch.arange(1, 9)[None], past_key_values=cache)
        fast(torch.tensor([[3]]), past_key_values=cache)
    prompt, *later = graphs(folder)
    assert prompt["unmeasured"] == "" and len(later) == 3  # in full, on 16 rows, on 64
    assert all("what earlier steps" in graph["unmeasured"] for graph in later)
    assert_stands_alone(folder)


def test_released_weights_are_not_replayed(folder):
    fast = compiled(tiny_lm(), "int8_weights", free_weights=True)
    with torch.no_grad():
        fast(torch.arange(4)[None])
        fast(torch.arange(4)[None].expand(2, -1))
    first, second = graphs(folder)
    assert first["unmeasured"] == "" and "free_weights" in second["unmeasured"]


def test_processes_do_not_overwrite_each_other(folder):
    """Two that begin in the same second under one number, as two containers on one disk do, have folders of their own."""
    for _ in range(2):
        _run_folder.cache_clear()
        torch._dynamo.reset()
        fast = compiled(torch.nn.Linear(64, 64).eval(), "int8_weights")
        with torch.no_grad():
            fast(torch.ones(2, 64))
            fast(torch.ones(2, 3, 64))
    assert len(list(folder.glob("run-*"))) == 2 and len(graphs(folder)) == 4
    assert len(list(folder.glob("run-*/graph-*/*.html"))) == 4
    assert (folder / "index.html").read_text().count(">diff<") == 4
    assert not list(folder.glob("*.tmp"))


@dataclass(frozen=True)
class Wrong(Pass):
    """Claims to be exact and is not."""

    factor: float = 2.0

    name: ClassVar[str] = "wrong"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "for tests"
    exact: ClassVar[bool] = True

    def apply(self, program, record):
        node = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        with program.graph.inserting_after(node):
            new = call(program.graph, node, aten.mul.Tensor, node, self.factor)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        record.take("layers.0", Done("wrong"))


@pytest.mark.parametrize("factor", [2.0, math.nan])
def test_a_pass_that_is_not_exact_is_named_with_where_to_look(folder, monkeypatch, factor):
    monkeypatch.setattr("accelpass.backends.debug.debug_mode.registered", lambda: {"wrong": Wrong})
    with torch.no_grad(), pytest.raises(Exception, match="'wrong' is declared exact and changed the outputs") as raised:
        compiled(tiny_lm(), Wrong(factor))(torch.arange(4)[None])
    assert isinstance(raised.value.inner_exception, PassError) and "index.html" in str(raised.value)
    assert list(folder.rglob("*wrong.html"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCELPASS_DEBUG", str(tmp_path / "file" / "below"))
    with torch.no_grad(), pytest.raises(Exception, match=r"cannot be written: Not a directory\. Set ACCELPASS_DEBUG"):
        compiled(tiny_lm(), "int8_weights")(torch.arange(4)[None])


def test_difference_tells_nan_from_nan():
    x = torch.tensor([1.0, -2.0, math.nan, math.inf])
    assert relative_difference(x, x.clone()) == 0
    assert relative_difference(x, torch.tensor([1.5, -2.0, math.nan, math.inf])) == 0.25
    for other in ([1.0, math.nan, math.nan, math.inf], [1.0, -2.0, 0.0, math.inf], [1.0, -2.0, math.nan, -math.inf]):
        assert relative_difference(x, torch.tensor(other)) == math.inf
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert largest_difference([x], [x, x]) == math.inf
    assert relative_difference(torch.tensor([1 + 1j]), torch.tensor([1 + 0j])) == 1


def test_a_diff_pairs_lines_and_leaves_equal_ones_out():
    before = "\n".join(["def f(", *(f"    # m.{i}\n    x{i} = aten.linear(x{i - 1}, w{i})" for i in range(20)), ""])
    after = before.replace("x7 = aten.linear(x6, w7)", "q = quantized(w7)\n    x7 = accelpass.linear(x6, w7)")
    (hunk,) = hunks(before, after)
    assert hunk.path == "m.7" and counted(before, after) == (1, 2)
    kinds = [row.kind for row in hunk.rows if row.kind != "same"]
    assert sorted(kinds) == ["changed", "new"]
    (changed,) = [row for row in hunk.rows if row.kind == "changed"]
    assert "<mark>" in changed.after and "x6" in changed.after
    assert hunks(before, before) == []
    assert "&lt;" in hunks("a < b", "a < c")[0].rows[0].before


def test_an_exported_program_is_told_the_same_way():
    exported = torch.export.export(tiny_lm(), (torch.arange(4)[None],))
    program = from_export(exported)
    text = listing(program)
    ast.parse(text)
    assert 'ids: "i64[1, 4]"' in text and re.search(r"aten\.linear\(.*\) +# f32\[1, 4, 128\]", text)
    assert inputs_said(program) == "ids i64[1, 4]"


@pytest.mark.parametrize(
    "passes", [["int8_weights"], [{"name": "sink_window", "density": 0.5, "sinks": 4, "block": 4, "reserve": 4}]]
)
def test_an_export_writes_each_pass_and_measures_it(folder, tmp_path, passes):
    pytest.importorskip("onnxruntime")
    ids = torch.arange(24)[None]
    kwargs = {"input_ids": ids, "use_cache": False}
    report = accelpass.export_onnx(tiny_llama(), (), tmp_path / "x.onnx", passes, kwargs=kwargs, verify=False)
    (note,) = [n for n in report.notes if n.startswith("debug: ")]
    assert str(folder) in note and "not measured" not in note
    assert_stands_alone(folder)
    (graph,) = graphs(folder)
    first, lowering = graph["passes"]
    assert first["took"] and first["page"] and float(first["difference"]) > 0
    assert lowering["name"] == "lowering" and float(lowering["difference"]) < 1e-3


@pytest.mark.slow
def test_an_exported_graph_with_a_cache_is_written_and_not_measured(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    model = tiny_llama()
    kwargs = {"input_ids": torch.arange(6)[None], "past_key_values": accelpass.KVCache(model, 12)}
    passes = [{"name": "kv_window", "budget": 0.5}]
    accelpass.export_onnx(model, (), tmp_path / "x.onnx", passes, kwargs=kwargs, verify=False)
    assert len(graphs(folder)) == 2
    for graph in graphs(folder):
        assert graph["passes"][0]["page"] and "compared as a whole" in graph["unmeasured"]
