"""The oracle of a packaged decoder: the same passes through torch.compile, their definitions run eagerly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelpass

PASSES: list[Any] = ["int8_weights"]
CAPACITY = 24


def prompts(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Token ids of :func:`tests.public.conftest.tiny_llama`."""
    return torch.randint(0, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(
    model: torch.nn.Module, passes: list[Any], ids: Tensor, count: int, capacity: int = CAPACITY
) -> list[Tensor]:
    """Of the ``count`` tokens after a prompt, the likeliest taken each time: ``(batch, vocabulary)`` for each."""
    cache = accelpass.KVCache(model, capacity=capacity, batch_size=ids.shape[0])
    fast = accelpass.compile(model, passes, lowering="eager")
    made, current = [], ids
    for _ in range(count):
        made.append(fast(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1])
        current = made[-1].argmax(-1)[:, None]
    return made


def answer(made: list[Tensor]) -> Tensor:
    """The likeliest tokens of logits, ``(batch, tokens)``."""
    return torch.stack([one.argmax(-1) for one in made], 1)
