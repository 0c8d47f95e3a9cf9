"""Which tokens of the last prompt each part of a model has read, kept for whoever asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Survivors:
    """The tokens that went on from one place.

    Attributes:
        path: the module that chose.
        kept: their positions in the prompt, ascending, ``(batch, kept)``.
        tokens: how many there were in the prompt.
    """

    path: str
    kept: Tensor
    tokens: int


_LAST: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep_last(model: Tensor | None, found: Sequence[Survivors]) -> None:
    """Remember what was chosen at the last prompt of the model that owns this tensor; nothing if all tokens went on."""
    if model is not None:
        _LAST[model] = tuple(found)


def last_of(tensors: Iterable[Tensor]) -> tuple[Survivors, ...]:
    """What was chosen at the last prompt of the model with these tensors."""
    return next((_LAST[t] for t in tensors if t in _LAST), ())


def forget_last(tensors: Iterable[Tensor]) -> None:
    """Forget what :func:`last_of` would find."""
    for t in tensors:
        _LAST.pop(t, None)
