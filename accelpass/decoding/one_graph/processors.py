"""Logits processors of transformers for all rows of a call at once, as part of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.interfaces import DecodingError

Settings = tuple[float, ...]


@dataclass(frozen=True)
class Processors:
    """What changes logits, in order: for each the name of its class in transformers, and its numbers.

    Attributes:
        steps: equal ones share a compiled graph.
    """

    steps: tuple[tuple[str, Settings], ...] = ()

    @staticmethod
    def of(given: Iterable[Any] | Callable[..., Tensor] | None) -> Processors:
        """Those of a request: a list of transformers' own; a function of another kind is none that a graph can hold.

        Raises:
            DecodingError: one of them is none that a graph can hold: it looks at the text's order or length, or is unknown.
        """
        found = []
        for one in given if isinstance(given, Iterable) else [] if given is None else [given]:
            name = type(one).__name__
            settings = _SETTINGS.get(name)
            if settings is None or getattr(one, "prompt_ignore_length", None) is not None:
                raise DecodingError(
                    f"{name} cannot be part of a step's graph: it looks at more than a token's logits and which tokens the text has. "
                    f"Leave it out, or one_graph= of the decoder; in a graph there may be {', '.join(sorted(_SETTINGS))}"
                )
            found.append((name, tuple(getattr(one, n) for n in settings)))
        return Processors(tuple(found))

    @property
    def looks_back(self) -> bool:
        """Whether any asks which tokens the text has."""
        return any(name == "RepetitionPenaltyLogitsProcessor" for name, _ in self.steps)

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """
        Args:
            logits: float32 ``(batch, rows, vocabulary)``.
            seen: which tokens stand in the text before each row or in it, bool of that shape; None where nothing looks back.
        """
        for name, settings in self.steps:
            logits = _RULES[name](logits, seen, *settings)
        return logits


def _temperature(logits: Tensor, seen: Tensor | None, temperature: float) -> Tensor:
    return logits / temperature


def _top_k(logits: Tensor, seen: Tensor | None, top_k: float, filter_value: float) -> Tensor:
    least = logits.topk(min(int(top_k), logits.shape[-1]), -1).values[..., -1:]
    return logits.masked_fill(logits < least, filter_value)


def _top_p(logits: Tensor, seen: Tensor | None, top_p: float, filter_value: float, least: float) -> Tensor:
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    # From the least likely up, as transformers adds them: 1 - top_p of what is left out, rounded alike.
    below = ranked.flip(-1).softmax(-1).cumsum(-1).flip(-1) <= 1 - top_p
    number = torch.arange(logits.shape[-1], device=logits.device)
    gone = (below & (number >= least)).scatter(-1, order, below & (number >= least))
    return logits.masked_fill(gone, filter_value)


def _min_p(logits: Tensor, seen: Tensor | None, min_p: float, filter_value: float, least: float) -> Tensor:
    probs = logits.softmax(-1)
    gone = probs < min_p * probs.amax(-1, keepdim=True)
    best = probs.topk(min(int(least), probs.shape[-1]), -1).indices
    return logits.masked_fill(gone.scatter(-1, best, False), filter_value)


def _repetition(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    assert seen is not None
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


_RULES: dict[str, Callable[..., Tensor]] = {
    "TemperatureLogitsWarper": _temperature,
    "TopKLogitsWarper": _top_k,
    "TopPLogitsWarper": _top_p,
    "MinPLogitsWarper": _min_p,
    "RepetitionPenaltyLogitsProcessor": _repetition,
}
_SETTINGS: dict[str, tuple[str, ...]] = {
    "TemperatureLogitsWarper": ("temperature",),
    "TopKLogitsWarper": ("top_k", "filter_value"),
    "TopPLogitsWarper": ("top_p", "filter_value", "min_tokens_to_keep"),
    "MinPLogitsWarper": ("min_p", "filter_value", "min_tokens_to_keep"),
    "RepetitionPenaltyLogitsProcessor": ("penalty",),
}
