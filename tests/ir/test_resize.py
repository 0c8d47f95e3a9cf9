"""A stretch of a graph for some rows of an axis is the dense result's rows, or is refused with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from accelpass.ir import attention
from accelpass.ir.analyses.axes.axes import Axes, Dim, axes
from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.attention.spec.spec import Band
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import aten, call, is_call, mutates, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.steps import drop_dead_writes, step_blocks, user_input
from accelpass.models_zoo import tiny_diffusers

BATCH, TOKENS, WIDTH = 4, 12, 16


def captured(model: Callable[..., Any], *args: Any, **given: Any) -> tuple[Program, list[Any]]:
    """The program, and the arguments of a call in the order in which its graph takes them."""
    found: list[tuple[Program, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        with torch.no_grad():
            program = from_dynamo(gm, inputs)
            attention.insert(program)
        found.append((program, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*args, **given)
    return found[0]


def resized(
    program: Program,
    inputs: list[Any],
    start: fx.Node,
    results: list[fx.Node],
    region: list[fx.Node],
    dim: int,
    rows: list[int],
) -> list[tuple[Tensor, Tensor]]:
    """(dense, resized) values of each result."""
    graph, found = program.graph, program.analysis(axes)
    (output,) = graph.find_nodes(op="output")
    program.gm.register_buffer("rows", torch.tensor(rows))

    with graph.inserting_before(output):
        index = graph.get_attr("rows")
        index.meta["val"] = value(start).new_empty(len(rows), dtype=torch.long)

        def take(node: fx.Node, at: int) -> fx.Node:
            return call(graph, node, aten.index_select.default, node, at, index)

        made = Resizer(graph, found, found.of(start)[dim], len(rows), take).copy(region, results)
    output.args = ((*results, *made),)
    graph.lint()
    program.gm.recompile()
    with torch.no_grad():
        values = program.gm(*inputs)
    return list(zip(values[: len(results)], values[len(results) :], strict=True))


def whole(program: Program, result: fx.Node | None = None) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """What the graph reads under the name x, what it returns, and all of its calls."""
    start = user_input(program, "x", "hidden_states")
    assert start is not None
    (output,) = program.graph.find_nodes(op="output")
    return start, list(output.args[0]), [n for n in program.graph.nodes if n.op == "call_function"]


class Tokenwise(nn.Module):
    """Each token by itself, with sizes written out in every spelling; an attention over the batch's own tokens beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) + self.table
        gate, rest = self.up(h).split([WIDTH, WIDTH], dim=-1)
        h = (gate * rest.sigmoid()).view(x.shape[0], TOKENS, 4, 4).transpose(1, 2).reshape(x.shape[0] * 4, TOKENS, 4)
        h = h.unflatten(0, (x.shape[0], 4)).transpose(1, 2).flatten(2)
        h = torch.cat([h, h.expand(x.shape[0], TOKENS, WIDTH)], -1)
        return x + self.down(h)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = torch.cat([*others, x], 1)
        q, k, v = (p(x).view(x.shape[0], -1, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH)
        return h[:, sum(o.shape[1] for o in others) :]


def test_rows_of_a_batch_and_of_tokens() -> None:
    for dim, rows in ((0, [0, 1]), (0, [3]), (1, [0, 5, 6, 11]), (1, list(range(TOKENS))), (1, [7])):
        program, inputs = captured(Tokenwise().eval(), torch.randn(BATCH, TOKENS, WIDTH))
        start, results, region = whole(program)
        ((dense, part),) = resized(program, inputs, start, results, region, dim, rows)
        torch.testing.assert_close(part, dense.index_select(dim, torch.tensor(rows)))


def test_attention_of_some_rows() -> None:
    model, x = Attends().eval(), torch.randn(BATCH, TOKENS, WIDTH)
    program, inputs = captured(model, x)
    ((dense, half),) = resized(program, inputs, *whole(program), 0, [2, 3])
    torch.testing.assert_close(half, dense[2:])
    program, inputs = captured(model, x)
    ((_, part),) = resized(program, inputs, *whole(program), 1, [1, 4, 9])
    with torch.no_grad():  # tokens that are left out are no keys either
        torch.testing.assert_close(part, model(x[:, [1, 4, 9]]))


def test_an_axis_that_is_joined_with_text() -> None:
    model, x, text = Attends().eval(), torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 5, WIDTH)
    program, inputs = captured(lambda x, text: model(x, text), x, text)
    ((_, part),) = resized(program, inputs, *whole(program), 1, [0, 2, 10])
    with torch.no_grad():
        torch.testing.assert_close(part, model(x[:, [0, 2, 10]], text))


def test_in_place_writes_inside() -> None:
    """Wan writes its rotary embedding piece by piece into an empty tensor."""
    torch.manual_seed(0)
    model, given = tiny_diffusers.build("wan")
    program, inputs = captured(model.eval(), **given)
    (first, *_) = step_blocks(program)
    (module,) = first.modules
    assert any(mutates(n) for n in module.region)
    ((dense, half),) = resized(program, inputs, module.streams[0], list(module.results), list(module.region), 0, [1])
    torch.testing.assert_close(half, dense[1:])


def _broken(x: Tensor, picks: Tensor, what: str) -> Tensor:
    if what == "arange":
        return x + torch.arange(TOKENS)[:, None]
    if what == "grid":
        return x.unflatten(1, (3, 4)).mean(1)
    if what == "select":
        return x + x[:, 2:3] * x.select(1, 3)[:, None]
    if what == "cut":
        return torch.cat([x[:, :3], x[:, 3:] * 2], 1)
    if what == "step":
        return x[:, ::2]
    if what == "chunk":
        return operator.add(*x.chunk(2, 1))
    if what == "roll":
        return x.roll(1, 1)
    if what == "pad":
        return F.pad(x, (0, 0, 1, 0))
    if what == "ones":
        return x * x.new_ones(TOKENS, 1)
    return x[:, picks]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("arange", "makes a tensor of its own for all rows"),
        ("grid", "apart from the rest of the grid|expected"),
        ("select", r"cuts the axis at 2|\(select\) works along the axis"),
        ("cut", "cuts the axis at 3"),
        ("step", "takes every 2th row"),
        ("chunk", r"\((chunk|split)\) works along the axis"),
        ("roll", r"\(roll\) works along the axis"),
        ("pad", r"gives \[4, 4, 16\] where \[4, 13, 16\] was expected"),
        ("ones", r"gives \[12, 1\] where \[3, 1\] was expected"),
        ("index", r"\(index\) works along the axis"),
    ],
)
def test_refused(what: str, why: str) -> None:
    given = torch.randn(BATCH, TOKENS, WIDTH), torch.tensor([0, 1, 2])
    program, inputs = captured(lambda x, picks: _broken(x, picks, what) * 2, *given)
    with pytest.raises(CannotResize, match=why):
        resized(program, inputs, *whole(program), 1, [0, 1, 4])
    if what != "arange":  # along the batch nothing stands in the way
        program, inputs = captured(lambda x, picks: _broken(x, picks, what) * 2, *given)
        ((dense, half),) = resized(program, inputs, *whole(program), 0, [0, 2])
        torch.testing.assert_close(half, dense[[0, 2]])


def test_a_joined_axis_that_is_cut_inside() -> None:
    def model(x: Tensor, text: Tensor) -> Tensor:
        joined = torch.cat([text, x], 1).tanh()
        return joined[:, 7:]  # the text has 5

    program, inputs = captured(model, torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 5, WIDTH))
    with pytest.raises(CannotResize, match="cuts the axis at 7"):
        resized(program, inputs, *whole(program), 1, [0, 2, 10])


def test_an_attention_that_a_pass_has_edited() -> None:
    program, inputs = captured(Attends().eval(), torch.randn(BATCH, TOKENS, WIDTH))
    start, results, region = whole(program)
    (node,) = [n for n in region if "attention" in str(n.target)]
    set_spec(node, spec_of(node).edited(by="other", select=Band(2)))
    with pytest.raises(CannotResize, match="another pass has edited the attention inside"):
        resized(program, inputs, start, results, region, 0, [0])


def test_an_axis_that_nobody_can_follow() -> None:
    program, _ = captured(lambda x: x.sin(), torch.randn(1, TOKENS, WIDTH))
    _, results, region = whole(program)
    found: Axes = program.analysis(axes)
    with pytest.raises(CannotResize, match="the axis analysis cannot follow the dimension"):
        Resizer(program.graph, found, Dim((), 1), 1, lambda node, dim: node).copy(region, results)


# --- writes that nothing reads


def writes(graph: fx.Graph) -> int:
    return sum(any(mutates(n)) for n in graph.nodes)


def test_dead_writes_are_dropped_and_live_ones_stay() -> None:
    def model(x: Tensor) -> Tensor:
        dead, live = torch.empty_like(x), torch.empty_like(x)
        dead[:, :3].copy_(x[:, :3].sin())
        dead[:, 3:] = 2.0
        live[:, :3].copy_(x[:, :3].cos())
        live[:, 3:].fill_(1.0)
        return live * 3

    x = torch.randn(2, 6)
    program, inputs = captured(model, x)
    before = writes(program.graph)
    drop_dead_writes(program.graph)
    program.gm.recompile()
    assert writes(program.graph) == before - 2 == 2
    assert not any(is_call(n, aten.sin) for n in program.graph.nodes) and any(
        is_call(n, aten.cos) for n in program.graph.nodes
    )
    assert torch.equal(program.gm(*inputs)[0], model(x))


def test_writes_to_what_the_caller_gave_stay() -> None:
    def model(x: Tensor, out: Tensor) -> Tensor:
        out[:, 1:].copy_(x[:, 1:])
        return x + 1

    program, _ = captured(model, torch.randn(2, 6), torch.zeros(2, 6))
    before = writes(program.graph)
    drop_dead_writes(program.graph)
    assert writes(program.graph) == before == 1
