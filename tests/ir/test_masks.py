"""What a mask over a symbolic number of tokens is called: only what it is at every number."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir import attention
from accelpass.ir.attention.recognition.masks import shows_all_held
from accelpass.ir.attention.spec.spec import Step
from accelpass.ir.core.capture import from_dynamo


def causal(at):
    return at <= at[:, None]


def causal_in_parts(at):
    """As transformers writes it: packed sequences, of which there is one, and positions gathered."""
    one = (at.diff(prepend=at[:1] - 1) != 1).cumsum(-1)
    return (one == one[:, None]) & (at[at] <= at[:, None])


def additive(at):
    return torch.zeros(at.shape[0], at.shape[0]).masked_fill(at > at[:, None], -torch.inf)


def strictly_earlier(at):
    return at < at[:, None]


def window(at):
    return causal(at) & (at > at[:, None] - 40)


def small_window(at):
    return causal(at) & (at > at[:, None] - 2)


def chunks(at):
    return causal(at) & (at // 16 == at[:, None] // 16)


def half(at):
    return causal(at) & (at < at.shape[0] // 2 + 1)


def long_window(at):
    """Longer than masks are looked at."""
    return causal(at) & (at > at[:, None] - 8192)


def named(mask, dynamic=True, tokens=20):
    found = []

    def backend(gm, example):
        (record,) = attention.detect(from_dynamo(gm, example))
        found.append((record.spec.bias, record.spec.window))
        return gm

    def core(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(torch.arange(q.shape[2])))

    torch._dynamo.reset()
    given = [torch.randn(2, 2, tokens, 4) for _ in range(3)]
    for tensor in given if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, (0, 2))
    with torch.no_grad():
        torch.compile(core, backend=backend, fullgraph=True)(*given)
    return found[0]


@pytest.mark.parametrize(
    ("mask", "of_20", "of_any"),
    [
        (causal, ("causal", None), ("causal", None)),
        (causal_in_parts, ("causal", None), ("causal", None)),
        (additive, ("causal", None), ("causal", None)),
        (strictly_earlier, ("tensor", None), ("tensor", None)),
        (window, ("causal", None), ("tensor", None)),
        (small_window, ("sliding_window", 2), ("sliding_window", 2)),
        (chunks, ("tensor", None), ("tensor", None)),
        (half, ("tensor", None), ("tensor", None)),
        (long_window, ("causal", None), ("tensor", None)),
    ],
)
def test_a_name_holds_for_every_number_of_tokens(mask, of_20, of_any):
    assert named(mask, dynamic=False) == of_20
    assert named(mask) == of_any


@pytest.mark.parametrize("mask", [causal, causal_in_parts, additive, small_window, chunks, half, window, long_window])
def test_a_number_of_tokens_too_large_to_compute_masks_at(mask):
    """The first long prompt, whose length the compiler takes for a constant."""
    names = {"small_window": ("sliding_window", 2), "window": ("sliding_window", 40), "chunks": ("tensor", None)}
    unknown = ("tensor", None) if mask in (half, long_window) else ("causal", None)
    assert named(mask, dynamic=False, tokens=5000) == names.get(mask.__name__, unknown)


def test_a_window_as_long_as_the_prompt_hides_nothing():
    assert named(lambda at: causal(at) & (at > at[:, None] - 5000), dynamic=False, tokens=5000) == ("causal", None)


def test_a_mask_of_data_has_no_name():
    assert named(lambda at: causal(at) & (torch.rand(at.shape[0]) > -1)) == ("tensor", None)


@pytest.mark.parametrize("made", ["keep", "add", "fill"])
def test_a_mask_that_shows_all_is_no_operand(made):
    """Towers that may pad an image mask every one; a mask of data stays, also beside one that shows all."""

    def attend(q, k, v, there):
        shape = (1, 1, q.shape[2], k.shape[2])
        if made == "fill":
            hidden = torch.zeros(shape, dtype=torch.bool)
            return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v
        mask = torch.ones(shape, dtype=torch.bool) if made == "keep" else torch.zeros(shape)
        whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return whole + F.scaled_dot_product_attention(q, k, v, attn_mask=there)

    found = []

    def backend(gm, example):
        program = from_dynamo(gm, example)
        found.extend(attention.insert(program))
        attention.lower(program)
        return program.gm

    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    there = torch.rand(2, 1, 5, 5) > 0.3
    there[..., 0] = True
    got = torch.compile(attend, backend=backend, dynamic=False)(q, k, v, there)
    torch.testing.assert_close(got, attend(q, k, v, there))
    assert [len(record.node.args[3]) for record in found] == ([0] if made == "fill" else [0, 1])


CAPACITY = 12


def counting(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[fx.Node, list[fx.Node]]:
    """The mask of one new token as a graph has it, and the counter, which is raised after the mask is made."""

    def run(count, more):
        made = mask(count, more)
        count.add_(1)
        return made

    graph = make_fx(run, tracing_mode="fake")(torch.zeros(2, dtype=torch.int64), torch.ones(CAPACITY, dtype=torch.bool))
    count, _ = graph.graph.find_nodes(op="placeholder")
    (made,) = graph.graph.output_node().all_input_nodes
    return made, [count]


HELD = {
    "what is held": (lambda count, more: torch.arange(CAPACITY) <= count[0], "keep", True),
    "the opposite": (lambda count, more: torch.arange(CAPACITY) > count[0], "fill", True),
    "a number": (lambda count, more: torch.where(torch.arange(CAPACITY) <= count[1], 0.0, -1e9), "add", True),
    "a window": (
        lambda count, more: (torch.arange(CAPACITY) <= count[0]) & (torch.arange(CAPACITY) > count[0] - 11), "keep", False
    ),
    "not the new one": (lambda count, more: torch.arange(CAPACITY) < count[0], "keep", False),
    "padding": (lambda count, more: (torch.arange(CAPACITY) <= count[0]) & more, "keep", False),
    "a bias": (lambda count, more: torch.where(torch.arange(CAPACITY) <= count[0], 0.5, -1e9), "add", False),
    "another size": (lambda count, more: torch.arange(CAPACITY + 1) <= count[0], "keep", False),
    "counted later": (lambda count, more: torch.arange(CAPACITY) <= count.add_(0)[0], "keep", False),
}  # fmt: skip


@pytest.mark.parametrize("which", HELD)
def test_a_mask_that_says_what_a_cache_holds(which):
    mask, kind, says = HELD[which]
    node, counts = counting(mask)
    assert shows_all_held(Step(kind, extra=0), node, counts, CAPACITY) is says


def test_a_window_of_the_whole_cache_hides_nothing_that_it_holds():
    node, counts = counting(
        lambda count, more: (torch.arange(CAPACITY) <= count[0]) & (torch.arange(CAPACITY) > count[0] - CAPACITY)
    )
    assert shows_all_held(Step("keep", extra=0), node, counts, CAPACITY)
