"""Classifier-free guidance while decoding: two prompts are continued by the same tokens, in the two halves of one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.interfaces import DecodingError
from accelpass.decoding.reader import Reader
from accelpass.decoding.tree import Tree


@dataclass(frozen=True)
class Guidance:
    """Logits ``u + scale * (c - u)``, of the prompt (c) and of one that does not say what is wanted (u); Ho & Salimans, arXiv 2207.12598.

    Attributes:
        scale: 1 leaves the prompt's own logits.
        without: the other prompt's ids, ``(tokens,)``, ``(1, tokens)`` or ``(batch, tokens)``, as many as the prompt's; or a function that
            makes them of the prompt's, ``(batch, tokens)``. Padding is where the prompt's is.
    """

    scale: float
    without: Tensor | Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise DecodingError(f"a guidance scale of {self.scale}: use a finite number; 1 is no guidance, 3 the usual")

    def beginning(self, ids: Tensor) -> Tensor:
        """The other prompt of each of ``ids``, ``(batch, tokens)``.

        Raises:
            DecodingError: it has another number of tokens.
        """
        made = self.without(ids) if callable(self.without) else self.without
        if made.shape[-1] != ids.shape[1] or made.dim() > 2 or (made.dim() == 2 and len(made) not in (1, len(ids))):
            raise DecodingError(
                f"the prompt without what is wanted has the shape {tuple(made.shape)}, and the prompt {tuple(ids.shape)}: both halves "
                "need equally many tokens; pad the shorter one at its left as the prompt is"
            )
        return made.to(ids.device, ids.dtype).expand(ids.shape[0], -1)


class GuidedReader(Reader):
    """Reads each piece twice in one call: after the prompts, and after those without what is wanted."""

    def __init__(self, model: Any, cache: Any, kwargs: dict[str, Any], guidance: Guidance, call: Any = None) -> None:
        super().__init__(model, cache, kwargs, call)
        self.guidance = guidance
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask])
        if self.positions is not None and self.positions.shape[-2] > 1:
            self.positions = torch.cat([self.positions, self.positions], -2)

    def first(self, ids: Tensor) -> Tensor:
        room = getattr(self.cache.layers[0], "batch_size", None) if self.cache.layers else None
        if room not in (None, 2 * len(ids)):
            raise DecodingError(
                f"guidance reads {len(ids)} prompts in two halves, and the cache holds {room} sequences; "
                f"use KVCache(model, capacity, {2 * len(ids)})"
            )
        return self._mixed(super().first(torch.cat([ids, self.guidance.beginning(ids)])))

    def read(self, piece: Tensor, tree: Tree | None = None) -> Tensor:
        return self._mixed(super().read(torch.cat([piece, piece]), tree))

    def _mixed(self, logits: Tensor) -> Tensor:
        wanted, without = logits.chunk(2)
        if self.hidden is not None:
            self.hidden = self.hidden[: len(wanted)]  # guesses follow from the prompt's half
        return without + self.guidance.scale * (wanted - without)
