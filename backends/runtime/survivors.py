"""Which tokens of the last prompt, and which patches of its images, each part of a model has read, kept for whoever asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accelpass.backends.runtime.caches import Tokens, tokens_of
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import STATE
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.transform.steps import PATCHES, SURVIVORS


@dataclass(frozen=True, eq=False)
class Survivors:
    """The tokens that went on from one place.

    Attributes:
        path: the module that chose.
        kept: their positions in the prompt, ascending, ``(batch, kept)``.
        tokens: how many there were in the prompt.
        patches: what went on are a tower's patches: ``kept`` is the row of its stream that each went into, ``(images, patches)``, -1
            where it has left.
    """

    path: str
    kept: Tensor
    tokens: int
    patches: bool = False


@dataclass(frozen=True, eq=False)
class Choices:
    """What a graph's last outputs say of the tokens that went on.

    Attributes:
        places: the modules that chose, behind what they chose from; tokens: how many there were, told from a call's arguments.
        model: position of one of the model's own tensors, or None.
    """

    places: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    model: int | None

    @staticmethod
    def of(program: Program) -> Choices | None:
        """None if no pass chooses among the tokens of this graph."""
        if program.survivors is None:
            return None
        tensors = program.tensors
        assert isinstance(tensors, FromInputs)
        of_text = [n.removeprefix(SURVIVORS) if n.startswith(SURVIVORS) else None for n in program.remembered]
        tokens = tuple(tokens_of(0 if path is None else program.survivors[path], tensors) for path in of_text)
        return Choices(tuple(program.remembered), tokens, tensors.model())

    def note(self, args: Sequence[Any], made: Sequence[Any]) -> Sequence[Any]:
        """Keep what a call has chosen; returns the model's own results."""
        own = len(made) - len(self.places)
        # Copies, because a graph that is replayed writes its results to one place.
        rows = zip(self.places, made[own:], self.tokens, strict=True)
        found = []
        for name, kept, tokens in rows:
            kind, _, path = name.partition(":")
            found.append(Survivors(path, kept.clone(), tokens(args), f"{kind}:" == PATCHES))
        keep_last(None if self.model is None else args[self.model], found)
        return made[:own]


_NAMED, _PATCHES = "survivors.", "patches."


def keep_last(model: Tensor | None, found: Sequence[Survivors]) -> None:
    """Remember what was chosen at the last prompt of the model that owns this tensor; nothing if all tokens went on."""
    if model is not None:
        for prefix in (_NAMED, _PATCHES):
            STATE.discard([model], prefix)
        for one in found:
            STATE.keep(model, (_PATCHES if one.patches else _NAMED) + one.path, one.kept, "sequence", one.tokens)


def last_of(tensors: Iterable[Tensor], patches: bool = False) -> tuple[Survivors, ...]:
    """What was chosen at the last prompt of the model with these tensors: of the text's tokens, or of its images' patches."""
    prefix = _PATCHES if patches else _NAMED
    held = STATE.of(tensors, prefix)
    return tuple(
        Survivors(slot.spec.name.removeprefix(prefix), slot.tensor, slot.mark, patches)
        for at, slot in held
        if at == held[0][0]
    )
