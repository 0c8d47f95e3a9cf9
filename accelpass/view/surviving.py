"""Which tokens of the last prompt went on, layer by layer: as data, as a strip of shares, and over the text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accelpass.api.lookup import tensors_of
from accelpass.backends.runtime.survivors import last_of

_SHARES = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class SurvivingTokens:
    """The tokens that went on from one place of the model.

    Attributes:
        path: the module that chose.
        tokens: how many there were in the prompt, padding included.
        kept: of each sequence, their positions in the prompt, ascending.
    """

    path: str
    tokens: int
    kept: tuple[tuple[int, ...], ...]

    def shares(self, cells: int, sequence: int = 0) -> list[float]:
        """The prompt in ``cells`` stretches (fewer, if it has fewer tokens): the share of each that went on."""
        cells = min(cells, self.tokens)
        edges = [self.tokens * i // cells for i in range(cells + 1)]
        kept = set(self.kept[sequence])
        return [sum(i in kept for i in range(a, b)) / (b - a) for a, b in itertools.pairwise(edges)]

    def strip(self, cells: int = 72, sequence: int = 0) -> str:
        """One character for each stretch of the prompt, the taller the more of it went on; blank where nothing did."""
        return "".join(_SHARES[-(-round(share * 1000) * 8 // 1000)] for share in self.shares(cells, sequence))

    def over(self, tokenizer: Any, ids: Tensor, sequence: int = 0, gap: str = " ... ") -> str:
        """The text that went on, with ``gap`` in the place of what did not.

        Args:
            ids: the prompt, ``(batch, tokens)``.

        Raises:
            ValueError: ``ids`` is another prompt, of another length.
        """
        if ids.dim() != 2 or ids.shape[1] != self.tokens:
            raise ValueError(
                f"the last prompt had {self.tokens} tokens; ids is {tuple(ids.shape)}, for (batch, tokens)"
            )
        runs: list[list[int]] = []
        for position in self.kept[sequence]:
            if not runs or position != runs[-1][-1] + 1:
                runs.append([])
            runs[-1].append(position)
        text = gap.join(tokenizer.decode(ids[sequence, run].tolist()) for run in runs)
        starts, ends = bool(runs) and runs[0][0] == 0, bool(runs) and runs[-1][-1] == self.tokens - 1
        return ("" if starts else gap.lstrip()) + text + ("" if ends else gap.rstrip())


def surviving_of(tensors: Iterable[Tensor]) -> tuple[SurvivingTokens, ...]:
    """What was chosen at the last prompt of the model with these tensors."""
    return tuple(SurvivingTokens(s.path, s.tokens, tuple(map(tuple, s.kept.tolist()))) for s in last_of(tensors))


def surviving_tokens(fast: Any) -> list[SurvivingTokens]:
    """Which tokens of the last prompt a token-pruning pass let through, one entry for each place that chose.

    Empty if all of them went on: the prompt was short, or no such pass took it.

    Args:
        fast: what ``torch.compile(..., backend="accelpass")`` returned.
    """
    return list(surviving_of(tensors_of(fast)))
