"""``evaluate``: how well a language model predicts text with passes, and how far it is from the model without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelpass.ir.errors import OptionError

WINDOW = 1024


@dataclass(frozen=True)
class Quality:
    """What the passes cost, over every token but the first of each window.

    Attributes:
        tokens: how many were scored.
        dense: perplexity of the model without passes.
        perplexity: with them.
        agreement: share of tokens for which both think the same one the likeliest.
        divergence: mean Kullback-Leibler divergence of the predictions from those without passes, in nats.
    """

    tokens: int
    dense: float
    perplexity: float
    agreement: float
    divergence: float

    @property
    def ratio(self) -> float:
        """Perplexity with passes by that without."""
        return self.perplexity / self.dense

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "ratio": self.ratio}


def evaluate(
    model: nn.Module,
    ids: Tensor,
    options: Mapping[str, Any] | None = None,
    window: int = WINDOW,
    on_window: Callable[[int], None] | None = None,
) -> Quality:
    """Compare a causal language model with itself under ``torch.compile(backend="accelpass", options=options)``.

    Windows are read without a cache, each on its own: what passes do to a cache is not seen (``benchmarks/kv_quality.py`` is for
    that).

    Args:
        model: takes ids ``(1, tokens)`` and returns logits, or what has ``logits``; not compiled.
        ids: the text ``(1, tokens)``.
        options: as of ``torch.compile``; a ``plan`` among them.
        window: tokens that are read at once.
        on_window: is told how many tokens are done.

    Raises:
        OptionError: the text has fewer than two tokens, or the model gives no logits.
    """
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] < 2 or window < 2:
        raise OptionError(f"evaluate needs ids (1, tokens) of two tokens or more; it was given {list(ids.shape)}")
    fast = torch.compile(model, backend="accelpass", options=dict(options or {}))
    sums, count, same = torch.zeros(3, dtype=torch.float64), 0, 0
    for part in ids.split(window, 1):
        if part.shape[1] < 2:
            break
        with torch.no_grad():
            dense, changed = (logits_of(call, part)[0, :-1].float() for call in (model, fast))
        plain, ours = dense.log_softmax(-1), changed.log_softmax(-1)
        target = part[0, 1:].to(plain.device)
        sums[0] += float(F.nll_loss(plain, target, reduction="sum"))
        sums[1] += float(F.nll_loss(ours, target, reduction="sum"))
        sums[2] += float((plain.exp() * (plain - ours)).sum())
        same += int((plain.argmax(-1) == ours.argmax(-1)).sum())
        count += len(target)
        if on_window is not None:
            on_window(count)
    lost, changed_lost, apart = (float(s) / count for s in sums)
    return Quality(count, math.exp(lost), math.exp(changed_lost), same / count, apart)


def logits_of(call: Any, ids: Tensor) -> Tensor:
    """The logits ``(batch, tokens, vocabulary)`` of a model, compiled or not, read without a cache."""
    config = getattr(call, "config", None)
    made = call(ids, use_cache=False) if config is not None and hasattr(config, "use_cache") else call(ids)
    found = made if isinstance(made, Tensor) else getattr(made, "logits", None)
    if not isinstance(found, Tensor):
        raise OptionError(f"{type(call).__name__} gives no logits; evaluate takes causal language models")
    return found
