"""Eager oracles of MoA, from its card: masks, sizes, slots, influence, and a whole model's attention with a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.passes.kv_truth import Oracle, mixed, probabilities


def moa_mask(alpha: Tensor, beta: Tensor, tokens: int, sink: int = 64, block: int = 64) -> Tensor:
    """The card's: ``(heads, tokens, tokens)``, True where a query sees a key."""
    span = (alpha + beta * tokens).clamp(min=block, max=max(tokens, block))
    visible = (span / block).ceil().long()
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    band = (i // block - j // block)[None] < visible[:, None, None]
    return (band | (j < sink)[None]) & (j <= i)[None]


def influence(a: Tensor, g: Tensor, eps: float = 1e-6) -> Tensor:
    """The card's: the change of the loss to first order if one entry is masked and its row normalised anew."""
    effect = -a * (g - (g * a).sum(-1, True)) / (1 - a + eps)
    effect[..., 0, :] = -(g * a)[..., 0, :]
    return effect


def cache_size(
    rule: tuple[float, float], seq: int, new: int, block: int = 64, sinks: int = 64, reserve: int = 1024
) -> int:
    """The card's, for any block; a rule for everything keeps everything, and a ring has at least one block."""
    alpha, beta = rule
    slots = alpha + beta * (seq + reserve)
    slots = seq + new if alpha >= 0 and beta >= 1 else min(slots, seq + new)
    return math.ceil(max(slots, 2 * block, sinks + block) / block) * block


def ring_slot(t: int, size: int, sink: int = 64) -> int:
    return t if t < size else sink + (t - sink) % (size - sink)


class Spans(Oracle):
    """Prompts under the card's mask; then each head sees what its ring keeps. ``rules`` are of key/value heads."""

    def __init__(self, rules, sinks: int, block: int, reserve: int, capacity: int):
        super().__init__()
        self.rules, self.sinks, self.block, self.reserve, self.capacity = rules, sinks, block, reserve, capacity

    def attend(self, layer, q, k, v, scale, mask, index):
        rules = self.rules[index] if isinstance(self.rules, dict) else self.rules
        total, new = k.shape[2], q.shape[2]
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        fresh = "kept" not in layer
        old = [[]] * heads if fresh else layer["kept"]
        if fresh or new > 1:
            sizes = [cache_size(r, total, self.capacity - total, self.block, self.sinks, self.reserve) for r in rules]
            layer["size"] = [max(pair) for pair in zip(sizes, layer.get("size", sizes), strict=True)]
        layer["kept"], seen = [], []
        for head in range(heads):
            candidates = [*old[head], *range(total - new, total)]
            ring = layer["size"][head] - self.sinks
            kept = [t for t in candidates if t < self.sinks or t >= total - ring]
            layer["kept"].append(kept)
            seen.append(kept if new == 1 and not fresh else candidates)
        if fresh:
            alpha, beta = torch.tensor(rules).unbind(-1)
            allowed = moa_mask(alpha, beta, total, self.sinks, self.block)
        else:
            causal = torch.arange(total)[None] <= torch.arange(total - new, total)[:, None]
            there = torch.zeros(heads, total, dtype=torch.bool)
            for head, tokens in enumerate(seen):
                there[head, tokens] = True
            allowed = causal[None] & there[:, None]
        return mixed(probabilities(q, k, scale, allowed.repeat_interleave(groups, 0)[None]), v)
