"""A mask that is causal AND padding is known to be causal, and nothing that hides more, or shows later keys, is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.attention.recognition.masks import is_causal_but_for_padding
from accelpass.ir.core.graph import value
from tests.ir.test_shrink import captured

TOKENS = 7
Mask = Callable[[Tensor], Tensor]


def places() -> tuple[Tensor, Tensor]:
    at = torch.arange(TOKENS)
    return at[:, None], at[None]


def causal(pad: Tensor) -> Tensor:
    query, key = places()
    return (key <= query) & pad.bool()[:, None, None]


def additive(pad: Tensor) -> Tensor:
    return torch.where(causal(pad), 0.0, torch.finfo(torch.float32).min)


def three(pad: Tensor) -> Tensor:
    query, key = places()
    return torch.ones(1, dtype=torch.bool) & torch.logical_and(key <= query, pad[:, None, None].bool())


def window(pad: Tensor) -> Tensor:
    query, key = places()
    return causal(pad) & (query - key < 3)


def packed(pad: Tensor) -> Tensor:
    return causal(pad) & (pad[:, None, :, None] == pad[:, None, None])


def both_ways(pad: Tensor) -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool) & pad.bool()[:, None, None]


def prefix(pad: Tensor) -> Tensor:
    query, key = places()
    return ((key <= query) | (key < 3)) & pad.bool()[:, None, None]


def either(pad: Tensor) -> Tensor:
    query, key = places()
    return (key <= query) | pad.bool()[:, None, None]


def shows_all(pad: Tensor) -> Tensor:
    return torch.where(causal(pad), 0.0, -1.0)


def biased(pad: Tensor) -> Tensor:
    return torch.where(causal(pad), 0.5, torch.finfo(torch.float32).min)


def of_queries(pad: Tensor) -> Tensor:
    query, key = places()
    return (key <= query) & pad.bool()[:, None, :, None]


@pytest.mark.parametrize(
    ("mask", "is_one"),
    [(causal, True), (additive, True), (three, True), (window, False), (packed, False), (both_ways, False), (prefix, False),
     (either, False), (shows_all, False), (biased, False), (of_queries, False)],
)  # fmt: skip
def test_what_is_causal_but_for_padding(mask: Mask, is_one: bool):
    x, pad = torch.randn(2, 2, TOKENS, 4), torch.ones(2, TOKENS, dtype=torch.long)
    program, _ = captured(lambda x, pad: F.scaled_dot_product_attention(x, 2 * x, 3 * x, attn_mask=mask(pad)), x, pad)
    (found,) = program.analysis(detect)
    sizes = value(found.q).shape[-2], value(found.k).shape[-2]
    assert is_causal_but_for_padding(found.spec, found.extras, *sizes) == is_one
