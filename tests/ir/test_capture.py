"""Both doors lead to one form, weights keep their paths, and what torch does with a backend is as we rely on."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import accelpass
from accelpass.backends import compiled_graphs
from accelpass.ir.core.capture import from_dynamo, from_export
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.program import Program
from tests.small_models import Mlp, tiny_lm


def dynamo_program(model: nn.Module, *args: torch.Tensor) -> Program:
    kept = []

    def backend(gm, inputs):
        kept.append(from_dynamo(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(*args)
    (program,) = kept
    return program


def operators(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


class Kinds(nn.Module):
    """Every way in which a module holds a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.listed = nn.ModuleList([nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        self.single = nn.Parameter(torch.randn(4))
        self.many = nn.ParameterList([torch.randn(4)])
        self.keyed = nn.ParameterDict({"k": torch.randn(4)})
        self.register_buffer("kept", torch.randn(4))
        self.constant = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.named["a"](self.listed[0](self.plain(x))))
        return x + self.single + self.many[0] + self.keyed["k"] + self.kept + self.constant


def test_paths_are_those_of_the_state_dict():
    model = Kinds()
    program = dynamo_program(model, torch.randn(2, 4))
    tensors = program.tensors
    found = {tensors.path(n): tensors.value(n) for n in placeholders(program.gm) if tensors.path(n)}
    wanted = {**model.state_dict(keep_vars=True), "constant": model.constant}
    assert set(found) == set(wanted)
    assert all(found[path] is wanted[path] for path in wanted)


@pytest.mark.parametrize("build", [lambda: (Mlp(), torch.randn(2, 64)), lambda: (tiny_lm(), torch.arange(6)[None])])
def test_both_doors_give_the_same_operators(build):
    model, x = build()
    with torch.no_grad():
        exported = from_export(torch.export.export(model.eval(), (x,)))
    assert operators(dynamo_program(model, x)) == operators(exported)


def test_the_graph_that_dynamo_owns_is_left_alone():
    before, after = [], []

    def backend(gm, inputs):
        before.append(str(gm.graph))
        program = from_dynamo(gm, inputs)
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            node.args = (node.args[0], node.args[1])
        after.append(str(gm.graph))
        return gm.forward

    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend=backend)(torch.ones(1, 4))
    assert before == after


def test_deepcopy_loses_sources():
    """Why capture retraces instead of copying: AOTAutograd needs the source of every input."""
    lost = []

    def backend(gm, inputs):
        twin = copy.deepcopy(gm)
        lost.append(any(getattr(n, "_dynamo_source", None) is None for n in placeholders(twin)))
        program = from_dynamo(gm, inputs)
        assert all(hasattr(n, "_dynamo_source") for n in placeholders(program.gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend=backend)(torch.ones(1, 4))
    assert lost == [True], "torch keeps them now: capture may be simplified"


class Cached(nn.Module):
    """A cache among the module's buffers, which the graph writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.copy_(self.proj(x))
        return self.cache * 2


def test_what_the_graph_writes_to_is_no_constant():
    program = dynamo_program(Cached(), torch.ones(3, 4))
    constant = {program.tensors.path(n) for n in placeholders(program.gm) if program.tensors.is_constant(n)}
    assert constant == {"proj.weight", "proj.bias"}
    assert "cache" in {program.tensors.path(n) for n in placeholders(program.gm)}


def test_a_write_through_data_is_kept():
    class Padded(torch.nn.Module):
        def forward(self, x):
            joint = x.new_zeros(x.shape[0], 5)
            joint.data[:, 2:].copy_(x)
            return joint * 2

    x = torch.randn(4, 3)
    fast = torch.compile(Padded(), backend="accelpass", options={"lowering": "aten"})
    with torch.no_grad():
        assert torch.equal(fast(x), Padded()(x))
    (graph,) = accelpass.explain(fast).graphs
    assert "not canonicalised" not in graph.note


def test_what_cannot_be_retraced_is_compiled_as_it_is():
    from torch._higher_order_ops.associative_scan import associative_scan

    class Scan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x):
            return associative_scan(lambda a, b: a * 0.5 + b, self.linear(x), 0, combine_mode="generic")

    model, x = Scan().eval(), torch.randn(6, 3)
    fast = torch.compile(model, backend="accelpass", options={"lowering": "aten"})
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-6)


def _masked(x, ids):
    """Which tokens see which, of one function of four numbers, as transformers builds the masks of Gemma 3."""
    sees = lambda b, q, k: (k <= q) | (ids[b, q] == ids[b, k])  # noqa: E731
    every = torch.vmap(torch.vmap(torch.vmap(sees, (None, None, 0)), (None, 0, None)), (0, None, None))
    places = torch.arange(x.shape[1])
    return x + every(torch.arange(x.shape[0]), places, places).to(x.dtype).sum(-1, keepdim=True)


def _twice(x, ids):
    """One reads what the other gives, and both read what was computed before."""
    scale = ids.to(x.dtype) + 1
    first = torch.vmap(lambda row, by: row * by.sum())(x, scale)
    return torch.vmap(lambda row, made: row - made.mean(0), (1, 1), 1)(x * 2, first) + first


@pytest.mark.parametrize("fn", [_masked, _twice])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_vmap_computes_is_written_out(fn, dynamic):
    x, ids = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    fast = torch.compile(fn, backend="accelpass", options={"lowering": "eager"}, dynamic=dynamic)
    with torch.no_grad():
        assert torch.allclose(fast(x, ids), fn(x, ids), atol=1e-6)
    (graph,) = accelpass.explain(fast).graphs
    assert "not canonicalised" not in graph.note, graph.note


class TestAliases:
    """``detach()`` and ``x[...]`` are tensors of their own: what is done to one's shape stays with it."""

    @staticmethod
    def _returned(x):
        return x.detach(), x[...], x

    @staticmethod
    def _transposed(x):
        y = x.detach()
        y.t_()
        return y + 1, y, x * 2

    @staticmethod
    def _in_place_and_viewed(x):
        y = x.clone()
        z = y.add_(1)
        z.unsqueeze_(0)
        z.mul_(2)
        return y.sum(0), z, x + 1

    @staticmethod
    def _swapped(x):
        y = x.T
        y.swapaxes_(0, 1).squeeze_()
        return y @ y.mT

    @staticmethod
    def _own_shape(x):
        x.t_()
        return x + 1

    @pytest.mark.parametrize("name", ["_returned", "_transposed", "_in_place_and_viewed", "_swapped", "_own_shape"])
    @pytest.mark.parametrize("lowering", ["eager", "aten"])
    def test_like_eager(self, name, lowering):
        fn, inputs = getattr(self, name), [torch.arange(6.0).reshape(2, 3) for _ in range(2)]
        fast = torch.compile(fn, backend="accelpass", options={"lowering": lowering})
        with torch.no_grad():
            want, got = fn(inputs[0]), fast(inputs[1])
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b)
            assert (a is inputs[1]) == (b is inputs[0])
            assert (a.data_ptr() == inputs[1].data_ptr()) == (b.data_ptr() == inputs[0].data_ptr())
        assert inputs[0].shape == inputs[1].shape

    def test_a_returned_alias_has_its_own_gradient_flag(self):
        fast = torch.compile(lambda x: x.detach(), backend="accelpass", options={"lowering": "eager"})
        x = torch.ones(2, requires_grad=True)
        with torch.no_grad():
            made = fast(x)
        assert made is not x and not made.requires_grad


class TestNotCanonical:
    """What a retrace would lose is compiled as it is, with a note."""

    @pytest.mark.parametrize("lowering", ["eager", "inductor"])
    def test_assertions_on_values(self, lowering):
        def fn(x, y):
            z = y.item()
            torch._check(z == 3)
            return x + z

        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            fast = torch.compile(fn, backend="accelpass", options={"lowering": lowering}, fullgraph=True)
            torch.testing.assert_close(fast(torch.zeros(4), torch.tensor([3])), torch.full((4,), 3.0))
            with pytest.raises(RuntimeError):
                fast(torch.zeros(4), torch.tensor([4]))
        assert "only a call shows" in compiled_graphs()[-1].report.note

    def test_assertions_on_tensors_stay(self):
        def fn(x):
            torch._assert_async((x > 0).all(), "positive")
            return x + 1

        fast = torch.compile(fn, backend="accelpass", options={"lowering": "eager"})
        fast(torch.ones(3))
        with pytest.raises(RuntimeError, match="positive"):
            fast(-torch.ones(3))
        assert compiled_graphs()[-1].report.note == ""

    def test_forward_gradients(self):
        def fn(x, t):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(forward_ad.make_dual(x, t).sin())[1]

        x, t = torch.randn(3), torch.ones(3)
        fast = torch.compile(fn, backend="accelpass", options={"lowering": "eager"})
        torch.testing.assert_close(fast(x, t), fn(x, t))
        assert "forward-mode gradients" in compiled_graphs()[-1].report.note


def _detached(x):
    return x.detach()


def _turned(x):
    y = x.detach()
    y.t_()
    return y + 1, x * 2


def _unsqueezed_through_another_alias(x):
    y = x[...].detach()
    y.unsqueeze_(0)
    return y.sum(0), x * 2


def _written_and_returned(x):
    y = x.detach()
    y *= 0.5
    return y


def _source_turned(x):
    made = x + 1
    y = made[...]
    made.t_()
    return y * 2, made


@pytest.mark.parametrize(
    "fn", [_detached, _turned, _unsqueezed_through_another_alias, _written_and_returned, _source_turned]
)
def test_an_alias_whose_metadata_is_its_own_stays(fn):
    x, y = (torch.arange(6.0).reshape(2, 3).requires_grad_(fn is _detached) for _ in range(2))
    with torch.no_grad():
        want, got = fn(x), torch.compile(fn, backend="accelpass", options={"lowering": "eager"})(y)
    want, got = (v if isinstance(v, tuple) else (v,) for v in (want, got))
    assert [(v.shape, v.requires_grad, v is x) for v in want] == [(v.shape, v.requires_grad, v is y) for v in got]
    assert all(map(torch.equal, want, got)) and y.shape == x.shape == (2, 3)
