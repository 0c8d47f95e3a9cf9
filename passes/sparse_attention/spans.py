"""Spans: each head sees the first tokens and its newest, and how many these are grows with the prompt (arXiv 2406.14909)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.ir.attention.spec.spec import AttentionSpec

Rule = tuple[float, float]
"""(alpha, beta): of a prompt of N tokens a head sees its newest ``alpha + beta * N``."""

EVERYTHING: Rule = (0.0, 1.0)


def span_blocks(rule: Rule, tokens: Any, size: int) -> Any:
    """``ceil((alpha + beta * tokens) / size)``, not yet at least 1.

    Args:
        tokens: an int or a tensor of integers. Computed in integers, so that both give the same.
    """
    alpha, beta = (Fraction(part).limit_denominator(1 << 12) for part in rule)
    common = alpha.denominator * beta.denominator
    whole = int(alpha * common) + int(beta * common) * tokens
    return (whole + (common * size - 1)) // (common * size)


def visible_blocks(rule: Rule, tokens: int, sinks: int, size: int) -> int:
    """Key blocks that the last query of ``tokens`` sees, sinks included: no query sees more."""
    return min(max(1, span_blocks(rule, tokens, size)) + sinks // size, -(-tokens // size))


def density(rule: Rule, tokens: int, sinks: int, size: int) -> float:
    """The share of key blocks that the last query sees: what the authors' code bounds (its mode "kv")."""
    return visible_blocks(rule, tokens, sinks, size) / -(-tokens // size)


@torch.library.custom_op("accelpass::head_span_blocks", mutates_args=())
def head_span_blocks(
    like: Tensor, rules: list[float], rows: int, columns: int, most: int, sinks: int, size: int
) -> tuple[Tensor, Tensor]:
    """Lists of the blocks that :class:`HeadSpans` names, int32 ``(rules, q_blocks, most)`` and ``(rules, q_blocks)``.

    An op of its own: its arithmetic depends on sizes alone, so that Inductor puts that of all layers into one loop; with rules
    that differ by layer a C++ compiler does not get through its twenty thousand lines.

    Args:
        like: any tensor of the device.
        rules: alpha and beta by turns.
    """
    pairs = list(zip(rules[::2], rules[1::2], strict=True))
    q_blocks, k_blocks, device = -(-rows // size), -(-columns // size), like.device
    entry = torch.arange(most, device=device)
    last = torch.arange(q_blocks, device=device).clamp_max(k_blocks - 1).unsqueeze(-1)
    made: dict[Rule, tuple[Tensor, Tensor]] = {}
    for rule in dict.fromkeys(pairs):
        first = (last + 1 - max(1, span_blocks(rule, columns, size))).clamp_min(0)
        apart = first.clamp_max(sinks // size)  # blocks of sinks that are not in the span
        listed = torch.where(entry < apart, entry, first - apart + entry).clamp_max(k_blocks - 1)
        made[rule] = listed.to(torch.int32), (apart + last - first + 1).squeeze(-1).to(torch.int32)
    tables, counts = (torch.stack([made[rule][i] for rule in pairs]) for i in (0, 1))
    return tables, counts


@head_span_blocks.register_fake
def _(
    like: Tensor, rules: list[float], rows: int, columns: int, most: int, sinks: int, size: int
) -> tuple[Tensor, Tensor]:
    shape = len(rules) // 2, -(-rows // size)
    return like.new_empty((*shape, most), dtype=torch.int32), like.new_empty(shape, dtype=torch.int32)


@dataclass(frozen=True)
class HeadSpans(BlockSelect):
    """Blocks of the first ``sinks`` tokens, and of the newest ``alpha + beta * N``, up to the query's own block.

    Attributes:
        rules: of each query head; one for all. N is the number of keys.
        sinks: tokens, a multiple of ``size``.
        size: tokens of a block. A span is rounded up to blocks, and is at least one.
    """

    part: ClassVar[str] = "head_spans"
    rules: tuple[Rule, ...]
    sinks: int = 64
    size: int = 64

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        """As :meth:`BlockSelect.blocks`. Made by arithmetic on the device; heads with equal rules have equal tables.

        Raises:
            ValueError: there are rules for another number of heads.
        """
        self._checked(q.shape[1])
        columns = k.shape[2]
        most = q_blocks = -(-q.shape[2] // self.size)
        if isinstance(columns, int) and isinstance(q_blocks, int):
            most = max(visible_blocks(rule, columns, self.sinks, self.size) for rule in self.rules)
        flat = [float(part) for rule in self.rules for part in rule]
        tables, counts = torch.ops.accelpass.head_span_blocks(q, flat, q.shape[2], columns, most, self.sinks, self.size)
        return Blocks(tables, counts, self.size)

    def mask(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        """As :meth:`BlockSelect.mask`, from positions: nothing here but operators that every exporter knows."""
        self._checked(q.shape[1])
        rows, columns, device = q.shape[2], k.shape[2], q.device
        tokens = torch.full((1,), columns, dtype=torch.int64, device=device)
        key = torch.arange(columns, device=device) // self.size
        query = (torch.arange(rows, device=device) // self.size).clamp_max(-(-columns // self.size) - 1).unsqueeze(-1)
        seen = {
            rule: (key <= query)
            & ((key < self.sinks // self.size) | (key > query - span_blocks(rule, tokens, self.size).clamp_min(1)))
            for rule in dict.fromkeys(self.rules)
        }
        return torch.stack([seen[rule] for rule in self.rules]).unsqueeze(0)

    def _checked(self, heads: int) -> None:
        if len(self.rules) not in (1, heads):
            raise ValueError(f"head_spans: there are rules for {len(self.rules)} heads, the attention has {heads}")

    def pairs(self, heads: int, rows: int, columns: int, causal: bool) -> int | None:
        if rows != columns:
            return None
        each = {
            rule: sum(self._seen(rule, at, columns, causal) for at in range(-(-rows // self.size)))
            for rule in self.rules
        }
        return sum(each[rule] for rule in self.rules) * (heads // len(self.rules))

    def _seen(self, rule: Rule, at: int, tokens: int, causal: bool) -> int:
        """Pairs of one block of queries."""
        first = max(0, at + 1 - max(1, span_blocks(rule, tokens, self.size)))
        own = min(self.size, tokens - at * self.size)
        before = (min(first, self.sinks // self.size) + at - first) * self.size
        return own * before + (own * (own + 1) // 2 if causal else own * own)


def shown(rules: Sequence[Rule]) -> str:
    """``3 heads 0.5 N, 6 heads 1024 + 0.25 N``."""
    counts = {rule: rules.count(rule) for rule in rules}
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) == 1:
        return f"spans of {_rule(ordered[0][0])} tokens"
    return "spans of " + ", ".join(f"{_rule(rule)} ({count} heads)" for rule, count in ordered) + " tokens"


def _rule(rule: Rule) -> str:
    alpha, beta = rule
    share = f"{beta:.3g} N" if beta != 1 else "N"
    if not beta or not alpha:
        return share if beta else f"{alpha:g}"
    return f"{share} {'+' if alpha > 0 else '-'} {abs(alpha):g}"
