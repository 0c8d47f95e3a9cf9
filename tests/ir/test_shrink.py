"""Rows taken out of an axis leave what a smaller model computes, in whatever way the model is written, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from accelpass.ir import attention
from accelpass.ir.analyses.axes.axes import Axis, axes
from accelpass.ir.analyses.structure.mlp import mlps
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.verify import signature, verify
from accelpass.ir.transform.changed_axes import CannotShrink, carriers, followers
from accelpass.ir.transform.kept import Static
from accelpass.ir.transform.shrink import shrink
from tests.sweep import examples

WIDTH, HIDDEN, HEADS, DIM = 8, 12, 4, 4


def captured(model: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[Program, list[Any]]:
    found: list[tuple[Program, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        with torch.no_grad():
            program = from_dynamo(gm, inputs)
            attention.insert(program)
        found.append((program, [i.node.hint if isinstance(i, torch.SymInt) else i for i in inputs]))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return found[0]


def run(program: Program, inputs: list[Any]) -> Tensor:
    attention.lower(program)
    bound = program.tensors.binder()(inputs)
    program.gm.recompile()
    with torch.no_grad():
        return program.gm(*bound)[0]


class Gated(nn.Module):
    """SwiGLU with one linear for each half, or one for both, cut in different ways; rows of a fused one may alternate."""

    def __init__(self, how: str, bias: bool) -> None:
        super().__init__()
        self.how = how
        count = 1 if how == "plain" else 2
        self.gate = nn.Linear(WIDTH, HIDDEN if how == "apart" else count * HIDDEN, bias)
        self.up = nn.Linear(WIDTH, HIDDEN, bias) if how == "apart" else None
        self.down = nn.Linear(HIDDEN, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        made = self.gate(x)
        if self.how == "plain":
            return x + self.down(F.gelu(made))
        if self.how == "glu":
            return x + self.down(F.glu(made, -1))
        if self.up is not None:
            gate, up = made, self.up(x)
        elif self.how == "chunk":
            gate, up = made.chunk(2, -1)
        elif self.how == "slices":
            gate, up = made[..., :HIDDEN], made[..., HIDDEN:]
        elif self.how == "view":
            gate, up = made.view(*x.shape[:-1], 2, HIDDEN).unbind(-2)
        else:
            gate, up = made[..., ::2], made[..., 1::2]
        return x + self.down(F.silu(gate) * up)


class Attending(nn.Module):
    """Heads of queries that share keys, projected apart or at once, with the heads repeated or grouped by sdpa."""

    def __init__(self, how: str, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.how, self.kv = how, kv_heads
        if how in ("apart", "grouped"):
            self.q = nn.Linear(WIDTH, HEADS * DIM, bias)
            self.k, self.v = (nn.Linear(WIDTH, kv_heads * DIM, bias) for _ in range(2))
        else:
            self.qkv = nn.Linear(WIDTH, (HEADS + 2 * kv_heads) * DIM, bias)
        self.o = nn.Linear(HEADS * DIM, WIDTH, bias)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        if self.how in ("apart", "grouped"):
            return tuple(p(x).view(batch, tokens, -1, DIM).transpose(1, 2) for p in (self.q, self.k, self.v))  # type: ignore[return-value]
        made = self.qkv(x)
        if self.how == "views":  # (3, heads, dim), as ViTs write it
            return made.view(batch, tokens, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]
        sizes = [HEADS * DIM, self.kv * DIM, self.kv * DIM]
        return tuple(p.view(batch, tokens, -1, DIM).transpose(1, 2) for p in made.split(sizes, -1))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.how != "grouped" and self.kv < HEADS:
            k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.how == "grouped")
        return x + self.o(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], HEADS * DIM))


def without(model: nn.Module, linear: str, kept: list[int], width: int = 1) -> nn.Module:
    """The model with zeros where a linear would read what is taken out: the oracle of channels and heads."""
    twin = copy.deepcopy(model)
    weight = twin.get_submodule(linear).weight
    mask = torch.zeros(weight.shape[1] // width)
    mask[kept] = 1
    with torch.no_grad():
        weight.mul_(mask.repeat_interleave(width))
    return twin


def hidden(program: Program) -> Axis:
    (mlp,) = program.analysis(mlps)
    (axis,) = program.analysis(axes).of(mlp.down.operand())[-1].leaves
    return axis


def heads(program: Program, number: int = 0) -> Axis:
    node = program.analysis(detect)[number].node
    (axis,) = program.analysis(axes).of(node.args[1])[-3].leaves
    return axis


def rows(size: int) -> Any:
    return st.sets(st.integers(0, size - 1), min_size=1, max_size=size).map(sorted)


@settings(max_examples=examples(12), deadline=None)
@given(
    how=st.sampled_from(["plain", "apart", "chunk", "slices", "view", "glu", "alternating"]),
    bias=st.booleans(), kept=rows(HIDDEN), tokens=st.integers(2, 5),
)  # fmt: skip
def test_channels(how: str, bias: bool, kept: list[int], tokens: int):
    torch.manual_seed(tokens)
    model, x = Gated(how, bias).eval(), torch.randn(2, tokens, WIDTH)
    program, inputs = captured(model, x)
    before = signature(program)
    shrunk = shrink(program, hidden(program), Static.rows(kept))
    verify(program, before, "shrink")
    assert {len(kept), 2 * len(kept)} & {s.after[0] for s in shrunk} and shrunk[-1].path.startswith("down")
    torch.testing.assert_close(run(program, inputs), without(model, "down", kept)(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=examples(12), deadline=None)
@given(
    how=st.sampled_from(["apart", "grouped", "views", "split"]), kv=st.sampled_from([4, 2]), bias=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_heads(how: str, kv: int, bias: bool, data: Any):
    kv = HEADS if how == "views" else kv
    kept = data.draw(rows(kv))
    torch.manual_seed(kv)
    model, x = Attending(how, kv, bias).eval(), torch.randn(2, 5, WIDTH)
    program, inputs = captured(model, x)
    before = signature(program)
    shrink(program, heads(program), Static.rows(kept))
    verify(program, before, "shrink")
    group = HEADS // kv
    mine = [group * k + i for k in kept for i in range(group)]
    torch.testing.assert_close(run(program, inputs), without(model, "o", mine, DIM)(x), atol=1e-5, rtol=1e-5)


def test_query_heads_of_each_group():
    model, x = Attending("apart", 2, True).eval(), torch.randn(2, 5, WIDTH)
    program, inputs = captured(model, x)
    (_, inner) = program.analysis(axes).of(program.analysis(detect)[0].node.args[0])[-3].leaves
    shrink(program, inner, Static.rows([1]))
    assert program.analysis(detect)[0].node is not None
    torch.testing.assert_close(run(program, inputs), without(model, "o", [1, 3], DIM)(x), atol=1e-5, rtol=1e-5)


class Stream(nn.Module):
    """A tied head over a normed stream: its width is in every weight."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(16, width), nn.LayerNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return F.linear(self.last(x), self.embed.weight)


def test_the_width_of_the_stream_norms_and_a_tied_head_included():
    model, ids, kept = Stream().eval(), torch.arange(6).reshape(2, 3), [0, 2, 3, 7]
    for norm in (model.norm, model.last):
        nn.init.normal_(norm.weight)
    program, inputs = captured(model, ids)
    (axis,) = program.analysis(axes).of(program.analysis(mlps)[0].x)[-1].leaves
    shrink(program, axis, Static.rows(kept))
    smaller = Stream(len(kept)).eval()
    with torch.no_grad():
        for name, weight in smaller.named_parameters():
            theirs = model.get_parameter(name)
            for dim in range(theirs.dim()):
                if theirs.shape[dim] == WIDTH:
                    theirs = theirs.index_select(dim, torch.tensor(kept))
            weight.copy_(theirs)
    torch.testing.assert_close(run(program, inputs), smaller(ids), atol=1e-5, rtol=1e-5)


def test_other_sizes_stay_symbolic():
    model = Attending("apart", 2, True).eval()
    program, _ = captured(model, torch.randn(3, 5, WIDTH), dynamic=True)
    shrink(program, heads(program), Static.rows([1]))
    (node,) = (n for n in program.graph.nodes if n.target is torch.ops.accelpass.attention.default)
    batch, kept, tokens, _ = value(node).shape
    assert kept == 2 and isinstance(batch, torch.SymInt) and isinstance(tokens, torch.SymInt)
    assert batch.node.expr.is_Symbol and tokens.node.expr.is_Symbol  # no guard made a number of them


def test_a_merged_size_that_only_run_time_knows_is_scaled():
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            made = self.up(x).transpose(0, 2).reshape(HIDDEN * tokens, batch).relu()
            return self.down(made.reshape(HIDDEN, tokens, batch).transpose(0, 2))

    model, x = Merged().eval(), torch.randn(3, 5, WIDTH)
    program, inputs = captured(model, x, dynamic=True)
    linear = program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    (axis,) = program.analysis(axes).of(linear.args[0])[-1].leaves
    shrink(program, axis, Static.rows([1, 2, 8]))
    torch.testing.assert_close(run(program, inputs), without(model, "down", [1, 2, 8])(x))


class Biased(nn.Module):
    """One bias for the heads of two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Attending("apart", HEADS, False) for _ in range(2))
        self.slopes = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        bias = (self.slopes * torch.arange(x.shape[1]))[None]
        for layer in (self.first, self.second):
            q, k, v = layer.parts(x)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + layer.o(out.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return x


def test_a_region_is_shrunk_alone_and_gets_its_rows_of_what_it_shares():
    model, x = Biased().eval(), torch.randn(2, 5, WIDTH)
    program, inputs = captured(model, x)
    first, second = (a.node for a in program.analysis(detect))
    order = list(program.graph.nodes)
    end = next(n for n in order if n > first and n.target is aten.add.Tensor)
    start = next(n for n in order if n.target is aten.linear.default and n > second.args[3][0])
    region = [n for n in order if start <= n <= end and n.op == "call_function"]
    shrink(program, heads(program), Static.rows([0, 3]), region)
    assert value(second).shape[1] == HEADS and value(first).shape[1] == 2
    wanted = without(model, "first.o", [0, 3], DIM)(x)
    torch.testing.assert_close(run(program, inputs), wanted, atol=1e-5, rtol=1e-5)


def region(program: Program, number: int) -> set[fx.Node]:
    of = program.analysis(detect)[number]
    return followers(program, heads(program, number), [*of.q_proj, *of.k_proj, *of.v_proj])


def test_attentions_that_share_a_bias_lose_heads_of_their_own():
    model, x = Biased().eval(), torch.randn(2, 5, WIDTH)
    program, inputs = captured(model, x)
    for number, kept in enumerate(([0, 3], [1])):
        shrink(program, heads(program, number), Static.rows(kept), region(program, number))
    wanted = without(without(model, "first.o", [0, 3], DIM), "second.o", [1], DIM)(x)
    torch.testing.assert_close(run(program, inputs), wanted, atol=1e-5, rtol=1e-5)


class Joint(nn.Module):
    """Two streams that attend together, and have output projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (Attending("apart", HEADS, True) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.cat(parts, 2) for parts in zip(self.one.parts(x), self.two.parts(y), strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        a, b = out.split([x.shape[1], y.shape[1]], 1)
        return x + self.one.o(a), y + self.two.o(b)


def test_a_joint_attention_loses_heads_in_both_streams_or_in_none():
    model, given = Joint().eval(), (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH))
    program, inputs = captured(model, *given)
    inside, before = region(program, 0), str(program.graph)
    last = program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    with pytest.raises(CannotShrink, match="which is outside, reads the axis"):
        shrink(program, heads(program), Static.rows([0, 3]), inside - {last})
    assert str(program.graph) == before
    shrink(program, heads(program), Static.rows([0, 3]), inside)
    attention.lower(program)
    bound = program.tensors.binder()(inputs)
    program.gm.recompile()
    with torch.no_grad():
        found = program.gm(*bound)
    wanted = without(without(model, "one.o", [0, 3], DIM), "two.o", [0, 3], DIM)(*given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_that_are_found_in_the_weights_follow_these():
    model, x = Gated("apart", True).eval(), torch.randn(2, 3, WIDTH)
    program, inputs = captured(model, x)
    axis = hidden(program)
    found = carriers(program, axis)
    assert [(c.weight.name and program.tensors.path(c.weight), c.dim) for c in found] == [
        ("gate.weight", 0), ("gate.bias", 0), ("up.weight", 0), ("up.bias", 0), ("down.weight", 1),
    ]  # fmt: skip
    down = found[-1]
    score = Recipe(("norm of down",), lambda w: (down.rows(w).abs().sum(1),))
    shrink(program, axis, Static.best(5, score, [down.weight]))
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.down.weight.normal_()
        kept = sorted(model.down.weight.abs().sum(0).topk(5).indices.tolist())
        torch.testing.assert_close(run_again(program, inputs), without(model, "down", kept)(x), atol=1e-5, rtol=1e-5)


def run_again(program: Program, inputs: list[Any]) -> Tensor:
    with torch.no_grad():
        return program.gm(*program.tensors.arguments(inputs))[0]


class Returned(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda t: t.cumsum(-1), "goes through the rows of the axis"),
        (lambda t: t.softmax(-1), "goes through the rows of the axis"),
        (lambda t: t[..., [1, 0, *range(2, HIDDEN)]], "picks rows of the axis by number"),
        (lambda t: F.pad(t[..., :3], (0, HIDDEN - 3)), "no rule says|some rows of the axis|cut into pieces"),
        (lambda t: t.sort(-1).values, "goes through the rows of the axis"),
        (lambda t: F.group_norm(t.transpose(1, 2), 3).transpose(1, 2), "no rule says"),
    ],
)
def test_what_cannot_do_with_fewer_rows_is_named_and_nothing_has_changed(act: Callable[[Tensor], Tensor], why: str):
    program, _ = captured(Returned(act).eval(), torch.randn(2, 5, WIDTH))
    axis = program.analysis(axes).of(program.graph.find_nodes(op="call_function", target=aten.linear.default)[0])[-1]
    before = str(program.graph)
    with pytest.raises(CannotShrink, match=why):
        shrink(program, axis.leaves[0], Static.rows([0, 1]))
    assert str(program.graph) == before


def test_what_the_caller_sees_is_not_shrunk():
    program, _ = captured(Stream().eval(), torch.arange(6).reshape(2, 3))
    before = str(program.graph)
    node = program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    (vocabulary,) = program.analysis(axes).of(node)[-1].leaves
    with pytest.raises(CannotShrink, match=r"picks rows of the axis by number|the graph returns it"):
        shrink(program, vocabulary, Static.rows([0, 1]))
    gated, _ = captured(Gated("plain", False).eval(), torch.randn(2, 5, WIDTH))
    (width,) = gated.analysis(axes).of(gated.analysis(mlps)[0].x)[-1].leaves
    with pytest.raises(CannotShrink, match="it is the caller's"):
        shrink(gated, width, Static.rows([0, 1]))
    assert str(program.graph) == before


@pytest.mark.parametrize(("kept", "why"), [([], "keep at least one"), ([2, 1], "ascending"), ([-1, 1], "from 0")])
def test_rows_are_checked(kept: list[int], why: str):
    with pytest.raises(ValueError, match=why):
        Static.rows(kept)


def test_rows_that_do_not_exist_are_refused():
    program, _ = captured(Gated("plain", False).eval(), torch.randn(2, 5, WIDTH))
    with pytest.raises(CannotShrink, match=f"row {HIDDEN} is kept"):
        shrink(program, hidden(program), Static.rows([0, HIDDEN]))
    shrink(program, hidden(program), Static.rows([0, 1]))
    with pytest.raises(CannotShrink, match="made smaller already"):
        shrink(program, hidden(program), Static.rows([0]))
