"""A prompt's graph of fixed sizes, made for fewer tokens, is the model on those tokens; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.program import Program
from accelpass.ir.transform.sequence.again import again
from accelpass.ir.transform.sequence.prompt import NoPrompt, Prompt, TokenInput
from accelpass.ir.transform.steps import recall_new

TOKENS, FEWER, WIDTH = 13, 5, 8


def captured(model: Callable[..., Any], *args: Any) -> tuple[Program, list[Any]]:
    found: list[tuple[Program, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((from_dynamo(gm, inputs), list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*args)
    return found[0]


def shortened(model: Callable[..., Any], x: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """(the graph for chosen rows, the model) on some rows of ``x`` ``(1, tokens, ...)``."""
    program, inputs = captured(model, x)
    at = next(i for i, given in enumerate(inputs) if given is x)
    tokens = TokenInput(placeholders(program.gm)[at], "rows", (1,))
    region = [n for n in program.graph.nodes if n.op == "call_function"]
    chosen, places = (recall_new(program, name, (1, len(rows)), torch.int64) for name in ("rows", "positions"))
    with torch.no_grad():
        again(program, Prompt((), (), 1, x.shape[1], (tokens,)), region, chosen, places)
        program.gm.recompile()
        # The newest input stands behind the others.
        (got,) = program.gm(*inputs, torch.tensor([rows]), torch.arange(len(rows))[None])
        return got, model(x[:, rows])


class Decoder(nn.Module):
    """One attention over tokens with their positions, of which it says with ``tail`` what it returns."""

    def __init__(self, tail: Callable[[Tensor], Tensor], mask: Callable[[int], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.places = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(64, WIDTH)
        self.register_buffer("table", torch.randn(64, WIDTH))
        self.tail, self.mask = tail, mask

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        x = x + self.places(torch.arange(tokens, device=x.device)) + self.table[:tokens]
        q, k, v = self.qkv(x).view(1, tokens, 2, 3 * WIDTH // 2).transpose(1, 2).chunk(3, -1)
        mask = None if self.mask is None else self.mask(tokens)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.tail(y.transpose(1, 2).reshape(1, tokens, WIDTH))


def causal(tokens: int) -> Tensor:
    at = torch.arange(tokens)
    return at[None, :] <= at[:, None]


ROWS = [1, 4, 5, 9, 10]


@pytest.mark.parametrize("mask", [None, causal], ids=["is_causal", "mask"])
@pytest.mark.parametrize(
    "tail",
    [lambda y: y[:, -1], lambda y: y[:, -1:], lambda y: y[:, -3:].mean(1), lambda y: y, lambda y: y[:, :1]],
    ids=["select", "slice", "last three", "all", "the first"],
)  # fmt: skip
def test_positions_are_counted_anew_and_the_end_is_the_new_end(tail, mask):
    x = torch.randn(1, TOKENS, WIDTH)
    got, want = shortened(Decoder(tail, mask), x, ROWS)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (lambda y: y[:, 12], "works along the axis"),
        (lambda y: y[:, 3:9].sum(1), "cuts the axis at 3"),
        (lambda y: y[:, ::2].sum(1), "every 2th row"),
        # Without its first row it is an axis of its own, of which nothing says how long it is now.
        (lambda y: y[:, 1:].sum(1), "was expected"),
        (lambda y: y.sum(1) / y.shape[1], "computes with 13"),
        (lambda y: y.sum(1) + torch.empty(y.shape[1]).zero_().sum(), "makes a tensor of its own"),
    ],
    ids=["a position", "a stretch", "every other", "but the first", "the length", "memory"],
)
def test_what_means_something_else_for_fewer_tokens(tail, why):
    with pytest.raises(NoPrompt, match=why):
        shortened(Decoder(tail), torch.randn(1, TOKENS, WIDTH), ROWS)
