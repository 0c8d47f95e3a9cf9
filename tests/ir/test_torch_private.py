"""Canaries: each private name of torch that the package uses still does what it is used for, and is used in one file only."""

from __future__ import annotations

import ast
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.variables.misc import NumpyVariable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from accelpass.ir import inductor_private, known_values_private, torch_private

ROOT = Path(__file__).parents[2]
ROOMS = ("accelpass", "ir", "passes", "backends")
ALLOWED = ("torch.ops.", "torch.ao.quantization.fx._decomposed")
"""Operators are named by their schema; the second has no other way to its operators, and its test is every W8A8 export."""


def private_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return {
        n
        for n in names
        if n.split(".")[0] in ("torch", "transformers", "diffusers")
        and not n.startswith(ALLOWED)
        and any(part.startswith("_") and not part.startswith("__") for part in n.split("."))
    }


def test_only_three_files_use_private_names() -> None:
    files = [f for room in ROOMS for f in (ROOT / room).rglob("*.py") if not any(p.is_symlink() for p in f.parents)]
    assert len(files) > 200
    found = {str(f.relative_to(ROOT)): private_names(ast.parse(f.read_text())) for f in files}
    for own in ("torch_private", "inductor_private", "known_values_private"):
        assert found.pop(f"ir/{own}.py")
    assert {f: names for f, names in found.items() if names} == {}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x) * self.scale


@pytest.fixture(scope="module")
def seen() -> dict[str, object]:
    """What is told of a graph while Dynamo compiles it."""
    found: dict[str, object] = {}

    def backend(gm, inputs):
        nodes = gm.graph.find_nodes(op="placeholder")
        found["frame"] = torch_private.frame_of(gm)
        found["paths"] = {torch_private.path_of(torch_private.source_of(n)) for n in nodes}
        found["names"] = {torch_private.source_name(n) for n in nodes}
        found["state"] = [torch_private.is_model_state(n) for n in nodes]
        found["code"] = torch_private.traced_code()
        found["known"] = all(t in torch_private.traced_tensors() for t in inputs)
        found["fake"] = all(isinstance(n.meta["example_value"], torch_private.FakeTensor) for n in nodes)
        return gm

    torch_private.forget_compilations()
    found["model"] = Model()  # held: a frame names its module weakly
    torch.compile(found["model"], backend=backend)(torch.ones(2, 4))
    return found


def test_dynamo_tells_where_inputs_come_from(seen) -> None:
    assert seen["paths"] == {None, ("inner.0.weight", "param"), ("inner.0.bias", "param"), ("scale", "buffer")}
    assert "L['x']" in seen["names"]
    assert sorted(seen["state"]) == [False, True, True, True]
    assert seen["known"] and seen["fake"]


def test_dynamo_tells_what_it_compiles(seen) -> None:
    frame = seen["frame"]
    assert frame.name == "Model.forward" and frame.number is not None and frame.module() is seen["model"]
    assert not frame.is_last
    assert seen["code"] is None or seen["code"].co_name == "forward"


def test_dynamo_tells_that_it_stopped() -> None:
    torch_private.forget_compilations()
    with torch_private.recompile_limit(1):
        fast = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        fast(torch.ones(2))
        fast(torch.ones(3))
    assert torch_private.has_stopped_compiling()
    torch_private.forget_compilations()


def test_a_new_input_counts_as_model_state() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("packed")
    torch_private.mark_model_state(node)
    assert torch_private.is_model_state(node) and torch_private.source_of(node) is None


def test_inductor_takes_settings_and_names_its_modes() -> None:
    assert {"default", "max-autotune"} <= set(inductor_private.inductor_modes())
    name = inductor_private.contracts_by_name()
    assert name is None or name.startswith("cpp.")
    gm = make_fx(lambda x: (x.sin() + 1,), tracing_mode="fake")(torch.ones(8))
    code = inductor_private.compile_with_inductor(gm, [torch.ones(8)], None, {"size_asserts": False})
    torch.testing.assert_close(code(torch.zeros(8))[0], torch.ones(8))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_bytes_are_read_by_one_instruction(dtype: torch.dtype) -> None:
    """And only inside: what others compile is as torch writes it."""
    from torch._inductor.utils import run_and_get_code

    def product(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (q.float() * x).sum(-1)

    q, x = torch.randint(0, 120, (40, 37)).to(dtype), torch.randn(37)  # the last five of a row are a tail
    gm = make_fx(lambda q, x: (product(q, x),), tracing_mode="fake")(q, x)
    with torch._inductor.config.patch({"cpp.simdlen": 256, "force_disable_caches": True}):
        (got,), (ours,) = run_and_get_code(lambda: inductor_private.compile_with_inductor(gm, [q, x], None, {})(q, x))
        _, (theirs,) = run_and_get_code(torch.compile(product), q, x)
    torch.testing.assert_close(got, product(q, x), atol=1e-3, rtol=1e-4)
    assert "_mm_loadl_epi64" in ours and "_mm_loadl_epi64" not in theirs


def test_autocast_and_gradients_are_seen_in_graphs() -> None:
    found = []

    def backend(gm, inputs):
        found.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        return gm

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu"):
            x = F.linear(x, x)
        with torch.no_grad():
            x = x + 1
        return x * x.data

    torch.compile(run, backend=backend)(torch.ones(2, 2, requires_grad=True))
    assert torch_private.ENTER_AUTOCAST in found and torch_private.EXIT_AUTOCAST in found
    assert torch_private.SET_GRAD_ENABLED in found
    assert torch_private.GET_DATA is None or torch_private.GET_DATA in found or torch.ops.aten.detach.default in found


def test_forward_gradients_are_seen() -> None:
    from torch._functorch import predispatch

    assert torch_private.switches_forward_gradients(predispatch._enter_dual_level)
    assert not torch_private.switches_forward_gradients(torch.sin)


def test_levels_that_a_failure_left_open_are_closed() -> None:
    level = lambda: torch._C._functorch.maybe_current_level() or 0  # noqa: E731
    with torch_private.closed_levels():
        torch_private.OPENS_VMAP(2, "error")
        torch_private.OPENS_VMAP(3, "error")
        assert level() == 2
    assert level() == 0


def test_values_of_constants_are_known_and_no_longer_afterwards() -> None:
    from torch._subclasses import fake_tensor

    def parts(x: torch.Tensor, text: str) -> list[torch.Tensor]:
        sizes = torch.tensor([[int(n) for n in text.split(",")]])
        return list(torch.split(x, torch.repeat_interleave(sizes.prod(-1), 2).tolist()))

    before, scalars = fake_tensor.CONSTANT_NUMEL_LIMIT, torch._dynamo.config.capture_scalar_outputs
    with known_values_private.values_known(), known_values_private.values_known():
        made = torch.compile(parts, backend="eager", fullgraph=True)(torch.arange(12.0), "2,3")
    assert [len(part) for part in made] == [6, 6]
    assert before == fake_tensor.CONSTANT_NUMEL_LIMIT and scalars == torch._dynamo.config.capture_scalar_outputs


def test_counts_and_products_of_numbers_are_known_and_what_stands_in_an_empty_tensor_is_not() -> None:
    def places(x: torch.Tensor, rows: int) -> torch.Tensor:
        index = torch.arange(rows * 4).reshape(rows, 4)
        kept = torch.nn.functional.pad(index, (0, 2), value=-1)
        kept = kept[kept >= 0]
        if np.prod(x.shape) % 2:
            kept = kept + 1
        return x[kept] + index.flatten()[x.long()][kept]

    x = torch.arange(8.0)
    with known_values_private.values_known():
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(places, backend=backend, fullgraph=True)(x, 2), places(x, 2))
    assert known_values_private.numpy_prod not in NumpyVariable.constant_fold_functions
    for empty in known_values_private._EMPTY:
        assert torch.Tag.nondeterministic_seeded not in empty.tags
    torch._dynamo.reset()


def test_the_processor_tells_what_it_multiplies() -> None:
    assert isinstance(torch_private.cpu_multiplies_bfloat16(), bool)
    assert isinstance(torch_private.cpu_multiplies_int8(), bool)
    a, b = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(torch_private.int8_product(a, b), a.int() @ b.int())


def test_sizes_that_are_marked_stay_constants() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm, given):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    fast = torch.compile(lambda x: x * x.shape[0], backend=keep)
    for rows in (3, 4, 5):
        x = torch.ones(rows, 2)
        torch_private.mark_static(x)
        assert float(fast(x)[0, 0]) == rows
    assert len(graphs) == 3
    torch._dynamo.reset()


def test_trees() -> None:
    tree = {"a": [1, 2], "b": (3,)}
    assert torch_private.tree_leaves(tree) == [1, 2, 3]
    assert torch_private.tree_map(lambda n: n + 1, tree) == {"a": [2, 3], "b": (4,)}
    assert torch_private.keystr(torch_private.tree_flatten_with_path(tree)[0][0][0]) == "['a'][0]"
    assert torch_private.tree_map_only(int, str, tree)["b"] == ("3",)


def test_handles_and_archives(tmp_path: Path) -> None:
    """What packages are written with and called through; libraries themselves are tested where packages are."""
    given = [torch.arange(3.0), torch.ones(2, dtype=torch.int64)]
    handles, held = torch_private.handles_of(given)
    assert len(set(handles)) == 2 and all(handles)
    assert all(map(torch.equal, torch_private.tensors_of(handles, held), given))
    assert all(map(torch.equal, torch_private.tensors_of(torch_private.handles_of(given)[0]), given))
    with torch_private.archive_writer(str(tmp_path / "a.pt2")) as writer:
        writer.write_bytes("data/x", b"y" * 100)
    content = (tmp_path / "a.pt2").read_bytes()
    assert content.index(b"y" * 100) % 64 == 0


def test_generate_hands_images_to_the_model() -> None:
    from tests.passes.visual_truth import asked, llava

    model, called = llava(), []
    assert known_values_private.read_images_in_forward(model)
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: called.append(kwargs), with_kwargs=True)
    got = model.generate(**asked(), max_new_tokens=2, do_sample=False)
    handle.remove()
    assert [given.get("pixel_values") is not None for given in called] == [True, False]
    assert torch.equal(got, llava().generate(**asked(), max_new_tokens=2, do_sample=False))
    assert not known_values_private.read_images_in_forward(torch.nn.Linear(2, 2))
