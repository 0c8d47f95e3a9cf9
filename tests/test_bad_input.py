"""Every mistake has a defined answer: an error that names the remedy, or a site skipped with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from accelpass.backends import graphs_of
from accelpass.ir.errors import AccelpassError, OptionError, PassError, PlanError
from accelpass.passes.core.options import parse
from accelpass.passes.core.plan import Plan
from tests.small_models import Mlp, relative_error, tiny_lm

IDS = torch.arange(12).reshape(2, 6)


def compiled(model, **options):
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pases": []}, "did you mean 'passes'"),
        ({"passes": "int8_weights"}, r"takes a list, for example \['int8_weights'\]"),
        ({"passes": ["int8_weight"]}, "did you mean 'int8_weights'"),
        ({"passes": [{"name": "int4_weights", "group": 64}]}, "did you mean 'group_size'"),
        ({"passes": [{"name": "int4_weights", "group_size": 48}]}, "use 32, 64 or 128"),
        ({"passes": [{"name": "int4_weights", "group_size": "64"}]}, "it takes int"),
        ({"passes": [{"name": "int4_weights", "group_size": True}]}, "it takes int"),
        ({"passes": [{"name": "int4_weights", "symmetric": 1}]}, "it takes bool"),
        ({"passes": [{"name": "int8_weights", "exclude": "lm_head"}]}, "it takes tuple"),
        ({"passes": ["int8_weights", "int8_weights"]}, "given twice"),
        ({"passes": [17]}, "17 is not a pass"),
        ({"preset": "lm"}, "did you mean 'llm'"),
        ({"lowering": "tvm"}, "use 'inductor', 'aten', 'eager'"),
        ({"debug": "yes"}, "takes True or False"),
        ({"mode": "max-autotun"}, "did you mean 'max-autotune'"),
        ({"plan": "/nowhere/plan.json"}, "there is no plan at"),
    ],
)
def test_options(options, says):
    with pytest.raises(OptionError if "plan" not in options else PlanError, match=says):
        parse(options)


def test_error_reaches_the_user_through_torch_compile():
    with torch.no_grad(), pytest.raises(Exception, match="did you mean 'int8_weights'") as caught:
        compiled(tiny_lm(), passes=["int8_weight"])(IDS)
    assert "OptionError" in repr(caught.value)


def test_plan_of_another_model(tmp_path):
    Plan.of(Mlp(32, 64), ["int8_weights"]).save(tmp_path / "plan.json")
    with torch.no_grad(), pytest.raises(Exception, match="belongs to another model"):
        compiled(Mlp(64, 96).eval(), plan=str(tmp_path / "plan.json"))(torch.zeros(2, 64))


def test_plan_round_trip(tmp_path):
    model = tiny_lm()
    Plan.of(model, [{"name": "int4_weights", "group_size": 32}], {"a": torch.ones(3)}).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.settings[0]["group_size"] == 32
    assert torch.equal(plan.tensors["a"], torch.ones(3))
    with torch.no_grad():
        compiled(model, plan=str(tmp_path / "plan.json"))(IDS)
    (graph,) = graphs_of(model)
    assert "int4_weights" in {r.name for r in graph.report.records}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "passes": 3, "fingerprint": {}}']
)
def test_corrupted_plan(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_plan_with_corrupted_tensors(tmp_path):
    Plan.of(tiny_lm(), ["int8_weights"], {"a": torch.ones(3)}).save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_model_without_linears():
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(8))
    with torch.no_grad():
        out = compiled(model, passes=["int8_weights"])(torch.ones(2, 8))
    assert out.shape == (2, 8)
    (graph,) = graphs_of(model)
    (record,) = (r for r in graph.report.records if r.name == "int8_weights")
    assert not record.took
    assert "no linear layer" in record.skipped["(model)"]


def test_gradients_through_packed_weights():
    with pytest.raises(Exception, match=r"no gradient through what it rewrites.*torch.no_grad"):
        compiled(tiny_lm(), passes=["int8_weights"])(IDS)


def test_gradients_without_lossy_passes_are_right():
    model = tiny_lm()
    compiled(model)(IDS).sum().backward()
    (graph,) = graphs_of(model)
    assert "gradients are wanted" in graph.report.note
    assert model.layers[0].up_proj.weight.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weight_is_not_packed(bad):
    model = tiny_lm()
    with torch.no_grad():
        model.layers[0].up_proj.weight[3, 4] = bad
        got = compiled(model, passes=["int8_weights"])(IDS)
        assert torch.equal(got.isnan(), model(IDS).isnan())
    (graph,) = graphs_of(model)
    (record,) = (r for r in graph.report.records if r.name == "int8_weights")
    assert record.skipped["layers.0.up_proj"] == "the weight holds NaN or infinity"


def test_weight_that_turns_nan_later_shows():
    model = tiny_lm()
    fast = compiled(model, passes=["int8_weights"])
    with torch.no_grad():
        assert not fast(IDS).isnan().any()
        model.layers[0].up_proj.weight[3, 4] = float("nan")
        assert fast(IDS).isnan().any()


def test_width_that_no_group_divides():
    model = Mlp(width=72, hidden=96).eval()
    x = torch.randn(2, 72)
    with torch.no_grad():
        compiled(model, passes=[{"name": "int4_weights", "group_size": 64}])(x)
    (graph,) = graphs_of(model)
    (record,) = (r for r in graph.report.records if r.name == "int4_weights")
    assert record.skipped["gate_proj"] == (
        "72 input channels are not a multiple of group_size=64; 8, 24 and 72 divide it, but groups are of 32, 64 or 128; "
        "int8_weights takes any width"
    )
    assert record.skipped["down_proj"].endswith("group_size=32 would fit")


def test_cuda_without_gpu():
    if torch.cuda.is_available():
        return
    from accelpass.backends.compile.compiler import backend

    class Pretender(torch.Tensor):
        device = torch.device("cuda")

    with pytest.raises(PassError, match="torch sees no GPU"):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1).as_subclass(Pretender)])


def test_graph_break_gives_right_numbers_and_two_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Mlp(), Mlp()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    torch.manual_seed(0)
    model, x = Broken().eval(), torch.randn(2, 64)
    with torch.no_grad():
        assert relative_error(compiled(model, passes=["int8_weights"])(x), model(x)) < 0.05
    graphs = graphs_of(model)
    assert len(graphs) == 2
    assert all(len(g.report.records[0].took) == 3 for g in graphs)


def test_recompile_for_another_shape_shares_packed_weights():
    model = tiny_lm()
    fast = compiled(model, passes=["int8_weights"])
    with torch.no_grad():
        for length in (4, 5, 9):
            ids = torch.arange(length).reshape(1, length)
            assert relative_error(fast(ids), model(ids)) < 0.05
    graphs = graphs_of(model)
    assert len(graphs) == 2, "one static graph, then one with a symbolic length"
    first, second = ({id(t) for t in g.binder.tensors()} for g in graphs)
    assert first == second


def test_training_mode_keeps_dropout():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    with torch.no_grad():
        out = compiled(model, passes=["int8_weights"])(torch.ones(4, 64))
    assert (out == 0).any()
    assert (out != 0).any()


def test_free_weights_releases_and_still_answers():
    model = tiny_lm()
    with torch.no_grad():
        other = torch.arange(5).reshape(1, 5)
        want, want_other = model(IDS), model(other)
        fast = compiled(model, passes=["int8_weights"], free_weights=True)
        assert relative_error(fast(IDS), want) < 0.05
        assert model.layers[0].up_proj.weight.untyped_storage().size() == 0
        assert relative_error(fast(other), want_other) < 0.05
        with pytest.raises(RuntimeError, match="storage"):
            model(IDS)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="released by free_weights"):
            compiled(model, passes=[{"name": "int4_weights", "group_size": 32}])(IDS)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"needs .* as floats"):
            compiled(model, passes=[])(IDS)


def test_free_weights_leaves_a_shared_storage_alone():
    model = Mlp().eval()
    flat = torch.randn(2 * 96 * 64)
    model.gate_proj.weight = nn.Parameter(flat[: 96 * 64].view(96, 64))
    model.up_proj.weight = nn.Parameter(flat[96 * 64 :].view(96, 64))
    with torch.no_grad():
        compiled(model, passes=["int8_weights"], free_weights=True)(torch.randn(2, 64))
    assert model.gate_proj.weight.untyped_storage().size() > 0
    assert model.down_proj.weight.untyped_storage().size() == 0


def test_free_weights_lets_go_of_memory_that_it_cannot_shrink():
    model, x = Mlp().eval(), torch.randn(2, 64)
    with torch.no_grad():
        want = model(x)
        loaded = torch.frombuffer(bytearray(model.up_proj.weight.numpy().tobytes()), dtype=torch.float32)
        model.up_proj.weight.data = loaded.view(96, 64)  # as weights from a file are: not torch's own memory
        bias = model.down_proj.bias
        bias.data = torch.frombuffer(bytearray(bias.numpy().tobytes()), dtype=torch.float32)
        assert not model.up_proj.weight.untyped_storage().resizable()
        fast = compiled(model, passes=["int8_weights"], free_weights=True)
        for _ in range(2):
            assert relative_error(fast(x), want) < 0.05
    assert model.up_proj.weight.untyped_storage().size() == 0
    assert model.up_proj.weight.shape == (96, 64)
    assert bias.untyped_storage().resizable()  # it would keep a mapped file in memory


def test_save_and_load(tmp_path, monkeypatch):
    from accelpass.api.packed import load, save

    model = tiny_lm(0)
    fast = compiled(model, passes=["int8_weights"], free_weights=True)
    with torch.no_grad():
        want = fast(IDS)
        save(fast, tmp_path / "packed")
        torch._dynamo.reset()
        monkeypatch.setattr("accelpass.ir.core.derived.DerivedTensors._store", _only_seeds())
        again = load(tiny_lm(5), tmp_path / "packed", lowering="eager")
        assert torch.equal(again(IDS), want)


def test_what_was_saved_comes_with_its_options(tmp_path):
    from accelpass.api.lookup import find
    from accelpass.api.packed import load, save

    given = {"lowering": "aten", "regions": False, "skip_sites": {"int8_weights": ["lm_head"]}, "free_weights": True}
    fast = compiled(tiny_lm(0), **{"passes": ["int8_weights"], **given, "inductor": {"max_fusion_size": 8}})
    with torch.no_grad():
        want = fast(IDS)
        save(fast, tmp_path / "packed")
        again = load(tiny_lm(5), tmp_path / "packed")
        assert torch.equal(again(IDS), want)
        options, there = (find(f).graphs[-1].options for f in (fast, again))
        for name in ("passes", "lowering", "regions", "skip_sites", "free_weights", "mode", "inductor"):
            assert getattr(there, name) == getattr(options, name)
        other = load(tiny_lm(6), tmp_path / "packed", lowering="eager")
        other(IDS)
        assert find(other).graphs[-1].options.lowering == "eager"


def test_saving_says_why_nothing_is_packed(tmp_path):
    from accelpass.api.packed import save

    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 100), nn.Linear(100, 8)).eval()
    for passes, said in (
        (
            ["int4_weights"],
            r"int4_weights took no layer \({0..1}: 24 input channels .*; 8 and 24 divide it.*; 2: 100 input",
        ),
        ([{"name": "int8_weights", "exclude": ["*"]}], r"int8_weights took no layer \({0..2}: named in exclude"),
        ([], "compile the model with int8_weights or int4_weights"),
    ):
        fast = compiled(model, passes=passes)
        with torch.no_grad():
            fast(torch.ones(2, 24))
        with pytest.raises(AccelpassError, match=f"nothing is packed: {said}"):
            save(fast, tmp_path / "packed")


def test_an_option_that_cannot_be_saved_is_named(tmp_path):
    from accelpass.api.packed import save

    fast = compiled(tiny_lm(0), passes=["int8_weights"], inductor={"post_grad_custom_post_pass": print})
    with torch.no_grad():
        fast(IDS)
    with pytest.raises(AccelpassError, match=r"'post_grad_custom_post_pass': ...}} holds a builtin_function_or_method"):
        save(fast, tmp_path / "packed")


def _only_seeds():
    from accelpass.ir.core.derived import DerivedTensors

    store = DerivedTensors._store

    def checked(self, key, sources, made):
        assert not any(t.is_meta for t in made)
        import inspect

        assert inspect.stack()[1].function == "seed", "a weight was packed again"
        return store(self, key, sources, made)

    return checked


def test_load_refuses_another_model_and_damage(tmp_path):
    from accelpass.api.packed import load, save

    fast = compiled(tiny_lm(0), passes=["int8_weights"])
    with pytest.raises(AccelpassError, match="call it once"):
        save(fast, tmp_path / "early")
    with torch.no_grad():
        fast(IDS)
    save(fast, tmp_path / "packed")
    with pytest.raises(PlanError, match="belongs to another model"):
        load(Mlp(), tmp_path / "packed")
    manifest = tmp_path / "packed" / "accelpass.json"
    content = json.loads(manifest.read_text())
    content["entries"][0]["tensors"] = ["nothing"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="damaged"):
        load(tiny_lm(0), tmp_path / "packed")


@pytest.mark.slow
def test_compiler_missing(tmp_path):
    """In a process of its own: Inductor remembers the compiler that it found."""
    code = (
        "import torch\n"
        "fast = torch.compile(torch.nn.GELU(), backend='accelpass')\n"
        "with torch.no_grad(): fast(torch.ones(2, 64))"
    )
    nowhere = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Inductor needs a C++ compiler" in done.stderr
    assert "apt install g++" in done.stderr
