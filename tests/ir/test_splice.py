"""Torch functions spliced into a graph: traced once for operands that are laid out alike, undone when one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import KEPT, Tracer, all_or_nothing, inserted
from tests.ir.test_shrink import captured


def _made(x: Tensor, y: Tensor) -> Tensor:
    return x.neg() * y.neg()


class Spliced:
    """A graph of ``-x * -y``: its nodes, and what it gives when it returns others."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.program: Program
        self.program, self.inputs = captured(_made, torch.randn(2, 3), torch.randn(2, 3))
        self.x, self.y = self.program.graph.find_nodes(op="placeholder")
        self.first = next(n for n in self.program.graph.nodes if n.op == "call_function")
        (self.out,) = self.program.graph.find_nodes(op="output")

    def returning(self, *nodes: fx.Node) -> Sequence[Tensor]:
        self.out.args = (list(nodes),)
        self.program.graph.lint()
        self.program.gm.recompile()
        return self.program.gm(*self.program.tensors.binder()(self.inputs))


def test_operands_that_are_copies_of_one_traced_function_are_told_apart() -> None:
    """They have one fake value, by which a trace knows its inputs."""
    at = Spliced()
    tracer = Tracer(at.program)
    (a,), (b,) = (tracer.run("next", lambda t: [t + 1], [n], at.out) for n in (at.x, at.first))
    pairs = ([a, a], [a, b], [b, a])
    differences = [tracer.run("difference", lambda s, t: [s - t], pair, at.out)[0] for pair in pairs]
    zero, one, other = at.returning(*differences)
    assert not zero.any()
    torch.testing.assert_close(one, 2 * at.inputs[0])
    torch.testing.assert_close(other, -2 * at.inputs[0])


def test_a_function_is_traced_once_for_operands_that_are_laid_out_alike() -> None:
    at, traced = Spliced(), []

    def function(t: Tensor) -> list[Tensor]:
        traced.append(t.shape)
        return [t * 2, t.sum()]

    tracer = Tracer(at.program)
    with at.program.graph.inserting_before(at.out):
        turned = inserted(at.program, at.out, lambda t: [t.t()], at.x)[0]
    results = [tracer.run("twice", function, [n], at.out) for n in (at.x, at.y, turned)]
    assert len(traced) == 2, "x and y have one layout, what is turned another"
    for (doubled, total), given in zip(results, (at.x, at.y, turned), strict=True):
        twice, summed, itself = at.returning(doubled, total, given)
        torch.testing.assert_close(twice, itself * 2)
        torch.testing.assert_close(summed, itself.sum())


def test_what_is_spliced_has_the_provenance_of_the_node_behind_it() -> None:
    at = Spliced()
    (made,) = inserted(at.program, at.first, lambda t: [t.exp()], at.x)
    assert {k: made.meta.get(k) for k in KEPT} == {k: at.first.meta.get(k) for k in KEPT}
    assert made.meta["val"].shape == (2, 3)


def test_a_tensor_that_a_function_makes_is_a_buffer_of_the_graph() -> None:
    at = Spliced()
    (made,) = inserted(at.program, at.out, lambda t: [t + torch.tensor([10.0, 20.0, 30.0])], at.x)
    assert [b.tolist() for _, b in at.program.gm.named_buffers()] == [[10.0, 20.0, 30.0]]
    torch.testing.assert_close(at.returning(made)[0], at.inputs[0] + torch.tensor([10.0, 20.0, 30.0]))


def test_a_function_may_write_to_what_it_is_given() -> None:
    at = Spliced()
    (made,) = inserted(at.program, at.out, lambda t: [t.mul_(3)], at.first)
    torch.testing.assert_close(at.returning(made)[0], at.inputs[0] * -3)


@pytest.mark.parametrize("fails", [True, False])
def test_all_or_nothing(fails: bool) -> None:
    at = Spliced()
    before = [n.name for n in at.program.graph.nodes]

    def edit(last: Callable[[Tensor], list[Tensor]]) -> None:
        with all_or_nothing(at.program):
            (made,) = inserted(at.program, at.out, lambda t: [t.exp() + 1], at.x)
            inserted(at.program, at.out, last, made)

    if fails:
        with pytest.raises(RuntimeError, match="shape"):
            edit(lambda t: [t.reshape(5)])
        assert [n.name for n in at.program.graph.nodes] == before
    else:
        edit(lambda t: [t.reshape(6)])
        assert len(list(at.program.graph.nodes)) == len(before) + 3
    torch.testing.assert_close(at.returning(at.first)[0], -at.inputs[0])
