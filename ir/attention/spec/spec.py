"""What one attention computes, and what passes want of it instead."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from accelpass.ir.core.parts import Part, tuples
from accelpass.ir.errors import SpecConflict

KINDS = ("self", "cross", "joint", "channel", "unknown")
BIAS_KINDS = ("none", "causal", "sliding_window", "alibi", "tensor")


@dataclass(frozen=True)
class Step:
    """One operation on the scores ``(..., q_heads, q_tokens, k_tokens)``; what the kinds mean is in ``steps.py``.

    Attributes:
        kind: a name from ``steps.STEPS``.
        extra: index of the tensor operand among the op's ``extras``.
        other: index of a second tensor operand.
        value: a JSON value (a number, a dtype's name, a list).
    """

    kind: str
    extra: int | None = None
    other: int | None = None
    value: Any = None

    def shown(self) -> str:
        parts = [f"#{i}" for i in (self.extra, self.other) if i is not None]
        parts += [] if self.value is None else [str(self.value)]
        return f"{self.kind}({', '.join(parts)})" if parts else self.kind


_EDITABLE = ("store", "format", "select")


class Store(Part):
    """Which keys and values are kept, and in what basis."""


class Format(Part):
    """How a kept row of keys or values is written."""


class Select(Part):
    """Which keys each query attends to."""

    def pairs(self, heads: int, rows: int, columns: int, causal: bool) -> int | None:
        """How many (query, key) pairs of all heads of one sequence are computed; None if that is not known before."""
        return None


class Places(NamedTuple):
    """Where a block of scores lies.

    ``queries``: positions ``(rows,)``; ``keys``: positions, broadcastable to ``(batch, kv_heads, keys)``, below 0 where there is
    no key; ``tokens``: how many there are once the call has ended, and ``step``: how many of them came after the prompt, each an
    integer or a tensor ``(batch,)``; ``head``: the number of the block's first key/value head.
    """

    queries: Tensor
    keys: Tensor
    tokens: Any
    step: Any = 0
    head: int = 0

    @property
    def end(self) -> Any:
        """``tokens`` as one number: all sequences of a call have as many, padding included."""
        return self.tokens[0] if isinstance(self.tokens, Tensor) else self.tokens


class ScoreTap(Part, ABC):
    """What each key gets of the scores of a block of queries; the library sums it over blocks.

    It is a function of masked scores alone, so that whatever computes them can give it: a prompt's attention in one piece or by
    blocks of rows, and that of a single token. ``wants`` of a storage names it by :attr:`key`. A query without keys (padding)
    gives nothing to any.
    """

    @property
    def rows(self) -> int | None:
        """How many of a call's last queries it reads; None for all. Blocks of earlier ones are left out."""
        return None

    @property
    def decay(self) -> float:
        """What a sum is worth when the next token has come."""
        return 1.0

    @property
    def is_mass_of_one(self) -> bool:
        """A call's single query gives each key its probability, which the attention has anyway."""
        return False

    @property
    def key(self) -> str:
        """The name of the statistic."""
        return json.dumps(self.to_json(), sort_keys=True)

    @abstractmethod
    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        """``(batch, kv_heads, keys)``, float32.

        Args:
            scores: as the softmax takes them, -inf where masked, ``(batch, kv_heads, groups, rows, keys)`` float32.
        """


@dataclass(frozen=True)
class AttentionMass(ScoreTap):
    """The probability that each key got, summed over queries and the query heads that share it."""

    part: ClassVar[str] = "attention_mass"

    @property
    def key(self) -> str:
        return "column_sums"

    @property
    def is_mass_of_one(self) -> bool:
        return True

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        # A row without keys (padding) is in no sum.
        return torch.nan_to_num(scores.softmax(-1)).sum((2, 3))


@dataclass(frozen=True)
class LastQueries(ScoreTap):
    """An observation window: what ``of`` gives for the last ``queries`` of a call alone (SnapKV, arXiv 2404.14469, section 3)."""

    part: ClassVar[str] = "last_queries"
    of: ScoreTap
    queries: int

    @property
    def rows(self) -> int | None:
        return self.queries if self.of.rows is None else min(self.queries, self.of.rows)

    @property
    def decay(self) -> float:
        return self.of.decay

    @property
    def is_mass_of_one(self) -> bool:
        return self.of.is_mass_of_one

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        early = at.queries < at.end - self.queries
        return self.of(scores.masked_fill(early.unsqueeze(-1), float("-inf")), at)


@functools.lru_cache(maxsize=256)
def tap_of(statistic: str) -> ScoreTap | None:
    """The tap that a statistic's name stands for; None for ``lse``, which is of queries: their scores' log-sum-exp.

    Raises:
        ValueError: it names neither.
    """
    if statistic == "lse":
        return None
    if statistic == AttentionMass().key:
        return AttentionMass()
    try:
        found = Part.from_json(json.loads(statistic))
    except (ValueError, KeyError):
        found = None
    if not isinstance(found, ScoreTap):
        raise ValueError(f"statistics {[statistic]} are not known; known: lse, column_sums, and the key of a ScoreTap")
    return found


@dataclass(frozen=True)
class Dense(Store):
    """Keys and values as they are."""

    part: ClassVar[str] = "dense"


@dataclass(frozen=True)
class Native(Format):
    """In the dtype that the model computes."""

    part: ClassVar[str] = "native"


@dataclass(frozen=True)
class All(Select):
    """Every key that the model itself lets through."""

    part: ClassVar[str] = "all"


@dataclass(frozen=True)
class SinksAndWindow(Select):
    """The first ``sinks`` keys, and the keys at most ``window - 1`` before the query."""

    part: ClassVar[str] = "sinks_and_window"
    sinks: int
    window: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: need sinks >= 0 and window >= 1")


@dataclass(frozen=True)
class Band(Select):
    """Query i attends to the keys j with ``|i - j| <= reach``, whatever the numbers of queries and keys.

    The window attention of DiTFastAttn (Yuan et al., 2024, arXiv 2406.08552): tokens are the flattened image, and the
    band is symmetric, as no token of an image comes after another.
    """

    part: ClassVar[str] = "band"
    reach: int

    def __post_init__(self) -> None:
        if self.reach < 0:
            raise ValueError(f"reach={self.reach}: need reach >= 0, at which a query attends to its own key alone")


@dataclass(frozen=True)
class BlockList(Select):
    """Listed (query block, key block) pairs of ``size`` tokens; ``per_head``: one such list for each query head.

    A query whose block is in no pair attends to nothing. The last block of queries or keys may be shorter.
    """

    part: ClassVar[str] = "block_list"
    size: int
    blocks: tuple[Any, ...]
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: a block has at least one token")


@dataclass(frozen=True)
class AttentionSpec:
    """What one ``accelpass::attention`` computes.

    Scores are ``q @ k^T * scale``, cut to ``causal`` (query i sees keys 0..i, as sdpa's ``is_causal``), then changed by
    ``steps`` in order. Exactly one step is the softmax; steps after it work on the probabilities.

    Attributes:
        groups: query heads per key/value head; k and v are not repeated.
        kind: where queries and keys come from: one of KINDS.
        bias: what is known of the additive or boolean mask: one of BIAS_KINDS. ``tensor`` means unknown.
        window: keys that a query sees, if ``bias`` is ``sliding_window``.
        edits: (pass name, part name) of every edit.
    """

    groups: int = 1
    scale: float = 1.0
    causal: bool = False
    steps: tuple[Step, ...] = (Step("softmax"),)
    kind: str = "unknown"
    bias: str = "none"
    window: int | None = None
    store: Store = field(default_factory=Dense)
    format: Format = field(default_factory=Native)
    select: Select = field(default_factory=All)
    statistics: frozenset[str] = frozenset()
    edits: tuple[tuple[str, str], ...] = ()
    site: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.bias not in BIAS_KINDS:
            raise ValueError(f"bias={self.bias!r} is not one of {', '.join(BIAS_KINDS)}")
        for statistic in self.statistics:
            tap_of(statistic)
        if sum(s.kind in ("softmax", "safe_softmax") for s in self.steps) != 1:
            raise ValueError("an attention has exactly one softmax step")

    @property
    def softcap(self) -> float | None:
        """Scores are ``softcap * tanh(scores / softcap)``; None without."""
        return next((s.value for s in self.before if s.kind == "softcap"), None)

    @property
    def sinks(self) -> bool:
        """A learned logit takes part in the softmax and is dropped after it."""
        return any(s.kind == "sink" for s in self.steps)

    @property
    def softmax(self) -> Step:
        return next(s for s in self.steps if s.kind in ("softmax", "safe_softmax"))

    @property
    def softmax_dtype(self) -> torch.dtype | None:
        """The dtype that the softmax asks for; None for that of its input."""
        return getattr(torch, self.softmax.value) if self.softmax.value else None

    @property
    def before(self) -> tuple[Step, ...]:
        """Steps on the logits."""
        return self.steps[: self.steps.index(self.softmax)]

    @property
    def after(self) -> tuple[Step, ...]:
        """Steps on the probabilities."""
        return self.steps[self.steps.index(self.softmax) + 1 :]

    @property
    def taps(self) -> dict[str, ScoreTap]:
        """The statistics of keys that are wanted, by name."""
        found = {name: tap_of(name) for name in sorted(self.statistics)}
        return {name: tap for name, tap in found.items() if tap is not None}

    @property
    def is_edited(self) -> bool:
        return bool(self.edits)

    @property
    def extras(self) -> int:
        """How many extra tensors the steps read."""
        used = [i for s in self.steps for i in (s.extra, s.other) if i is not None]
        return max(used, default=-1) + 1

    def edited(
        self,
        *,
        by: str,
        store: Store | None = None,
        format: Format | None = None,
        select: Select | None = None,
        statistics: frozenset[str] | set[str] = frozenset(),
    ) -> AttentionSpec:
        """This spec as pass ``by`` wants it.

        Raises:
            SpecConflict: another pass already gave the attention a store, or a selection.
        """
        edits = list(self.edits)
        changes: dict[str, Any] = {}
        for name, new in (("store", store), ("format", format), ("select", select)):
            if new is None:
                continue
            owner = next((who for who, part in edits if part == name), None)
            if owner is not None and owner != by and getattr(self, name) != new:
                raise SpecConflict(
                    f"{by!r} wants {name}={new.part} for the attention at {self.site or 'an unnamed site'}, but "
                    f"{owner!r} already gave it {name}={getattr(self, name).part}. Use one of the two passes there."
                )
            changes[name] = new
            edits.append((by, name))
        if not statistics <= self.statistics:
            changes["statistics"] = self.statistics | statistics
            edits.append((by, "statistics"))
        return replace(self, **changes, edits=tuple(dict.fromkeys(edits)))

    def to_json(self) -> str:
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["steps"] = [[s.kind, s.extra, s.other, s.value] for s in self.steps]
        data |= {name: getattr(self, name).to_json() for name in _EDITABLE}
        data["statistics"] = sorted(self.statistics)
        default = AttentionSpec()
        kept = {k: v for k, v in data.items() if k in ("steps", "scale") or getattr(self, k) != getattr(default, k)}
        return json.dumps(kept, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AttentionSpec:
        data = json.loads(text)
        data["steps"] = tuple(Step(k, e, o, tuples(v)) for k, e, o, v in data["steps"])
        for name in _EDITABLE:
            if name in data:
                data[name] = Part.from_json(data[name])
        data["statistics"] = frozenset(data.get("statistics", ()))
        data["edits"] = tuple((a, b) for a, b in data.get("edits", ()))
        return AttentionSpec(**data)
