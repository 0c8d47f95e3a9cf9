"""MInference: each head of a prompt reads few columns and diagonals, or the pattern that its plan has (arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention
from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.ir.errors import PlanError
from accelpass.passes.core.base import Skip, Study
from accelpass.passes.sparse_attention.head_plan import HeadPlan
from accelpass.passes.sparse_attention.patterns.head_patterns import (
    A_SHAPE,
    BLOCKS,
    LINES,
    HeadPatterns,
    Pattern,
    shown,
)
from accelpass.passes.sparse_attention.patterns.vertical_slash import VerticalSlash

_COLUMNS = (30 / 830, 100 / 850, 500 / 1200, 3500 / 3600)
"""Columns among the lines that are tried (the authors' search: 30 and 800, 100 and 750, 500 and 700, 3500 and 100)."""
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Lines, or keys of blocks, in shares of the longest prompt."""


@dataclass(frozen=True)
class MInference(HeadPlan):
    """Each head of a prompt reads the columns and the diagonals to which its last 64 queries pay most, or a pattern of its own.

    Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", section 3.2 and
    algorithm 1, the vertical-slash pattern. The first columns and the nearest diagonals are always read. Keys of chosen columns
    are gathered into blocks of their own; diagonals are rounded up to whole blocks of keys, so that somewhat more is read than the
    lines hold. Causality is by token. Keys are cached in their order; decoding stays dense.

    Calibration (section 3.1): the kernel-aware search. Each head tries the A-shape, columns and diagonals in four proportions, and
    blocks whose means go together, each in several sizes, on the calibration prompts; of those that read at most ``density`` of the
    causal blocks, as the kernel reads them, it takes the one whose output is nearest to the dense one. The paper's search
    has one amount of work for all; that ``density`` is half is inferred.

    Attributes:
        vertical: columns that are read; 1,000 is what the authors' code takes where no search was done. Of all heads without a plan.
        slash: diagonals that are read; 6,096 likewise.
        first: columns at the beginning that are always read, and count.
        local: diagonals next to the main one that are always read, and count.
        block: tokens of a block.
        density: share of the causal blocks that a pattern of calibration may read.

    Raises:
        OptionError: a number out of range.
        PlanError: when compiled, a plan for other heads.
    """

    name: ClassVar[str] = "minference"
    summary: ClassVar[str] = "prompts read the columns and diagonals of attention that the last queries look at"
    paper: ClassVar[str] = "MInference, arXiv 2407.02490"
    identity: ClassVar[dict[str, Any] | None] = {"slash": 1 << 30}
    planned: ClassVar[str] = "patterns"
    width: ClassVar[int] = 3
    vertical: int = 1000
    slash: int = 6096
    first: int = 30
    local: int = 100
    block: int = 64
    density: float = 0.5

    def __post_init__(self) -> None:
        for option, least in (("vertical", 1), ("slash", 1), ("first", 0), ("local", 1), ("block", 1)):
            if getattr(self, option) < least:
                raise self.fail(option, f"{least} or more")
        if not 0 < self.density <= 1:
            raise self.fail("density", "a share of the causal blocks above 0, at most 1")
        self.check_sites()

    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        most = max(self.slash, self.local), max(self.vertical, self.first)
        if isinstance(tokens, int) and tokens <= max(most):
            return Skip(
                f"its {tokens} tokens are no more than the {most[0]} diagonals or {most[1]} columns that are read"
            )
        select = VerticalSlash(self.block, self.vertical, self.slash, self.first, self.local)
        return select, f"{most[1]} columns and {most[0]} diagonals, in blocks of {self.block} keys"

    def of_heads(self, rows: Tensor) -> tuple[BlockSelect, str]:
        each = tuple((int(kind), int(a), int(b)) for kind, a, b in rows.tolist())
        for pattern in each:
            if pattern[0] not in (A_SHAPE, LINES, BLOCKS) or pattern[1] < 0 or pattern[2] < 0:
                raise PlanError(f"minference: {pattern} in the plan is no pattern; calibrate again with this version")
        return HeadPatterns(self.block, each, self.first, self.local), f"{shown(each)}, in blocks of {self.block} keys"

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """See the class. Beside the patterns: ``minference/perplexity``."""
        longest = self.tried(study, (), "lengths of prompts").tokens
        tries = self.tries(longest)
        trials = self.tried(study, [HeadPatterns(self.block, (p,), self.first, self.local) for p in tries], "patterns")
        rows = {}
        for site, errors in trials.errors.items():
            read = trials.read[site] / trials.calls[site]
            least = read.amin(1, keepdim=True)  # where none reads so little
            allowed = (read <= self.density) | ((least > self.density) & (read <= least))
            rows[site] = torch.tensor(tries, dtype=torch.float64)[errors.masked_fill(~allowed, torch.inf).argmin(1)]
        before, after = (
            self.perplexity(study, of, what) for of, what in ((None, "the dense model"), (rows, "the plan"))
        )
        return self.made(rows, before, after)

    def tries(self, tokens: int) -> list[Pattern]:
        """Patterns for prompts of so many tokens."""
        made: list[Pattern] = []
        for share in _SHARES:
            keys = max(self.block, int(share * tokens))
            made += [(LINES, max(1, round(keys * of)), max(1, round(keys * (1 - of)))) for of in _COLUMNS]
            made += [(A_SHAPE, self.first, keys), (BLOCKS, -(-keys // self.block), 0)]
        return list(dict.fromkeys(made))
