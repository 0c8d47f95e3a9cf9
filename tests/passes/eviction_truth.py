"""The eager oracle of methods that evict by a score, with every wrapper over one: written from their cards and papers, in loops.

It keeps all tokens and a mask of those that are left, as the oracles of :mod:`tests.passes.kv_truth` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.passes.kv_cache.storage.lots import drawn, gumbel
from tests.passes.kv_truth import MiKV, Oracle, mixed, probabilities


@dataclass
class Budget:
    """``heavy`` and ``recent`` as shares of the prompt (floats) or as tokens; ``None`` turns a wrapper off.

    Attributes:
        answer: tokens after the prompt that are stored before any leaves.
        window: SnapKV's last queries of the prompt; kernel: its pooling, by the mean.
        safeguard: AdaKV's.
        layers, pyramid: PyramidKV's beta, for so many layers.
    """

    heavy: float | int
    recent: float | int
    sinks: int = 0
    answer: int = 0
    window: int | None = None
    kernel: int = 1
    safeguard: float | None = None
    pyramid: float | None = None
    layers: int = 1

    def at(self, total: int, layer: int) -> tuple[int, int]:
        """Tokens that stay, and the newest of them."""
        heavy = self.heavy
        if self.pyramid is not None:
            first = heavy * (2 - 1 / self.pyramid)
            if isinstance(heavy, float):
                first = min(first, 1 - self.recent)
            last = 2 * heavy - first
            heavy = first + (last - first) * (layer / (self.layers - 1))
            heavy = round(heavy) if isinstance(self.heavy, int) else heavy
        whole = sum(p for p in (self.heavy, self.recent) if isinstance(p, float)) >= 1
        large, newest = (p if isinstance(p, int) else int(p * total + 1e-6) for p in (heavy, self.recent))
        newest = max(1, newest)
        return (10**9 if whole else large + newest + self.sinks), newest


class Evicting(Oracle):
    """H2O's score, unless a subclass has another."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def attend(self, layer, q, k, v, scale, mask, index):
        batch, kv_heads, n, _ = k.shape
        new = q.shape[2]
        prompt = "alive" not in layer
        old = layer.get("alive", torch.zeros(batch, kv_heads, 0, dtype=torch.bool))
        score = layer.get("score", torch.zeros(batch, kv_heads, 0))
        alive = torch.cat([old, torch.ones(batch, kv_heads, new, dtype=torch.bool)], -1)
        layer["step"] = n - layer.setdefault("prompt", n)
        layer["index"] = index
        p = self.weights(layer, q, k, scale, mask, alive)
        out = mixed(p, v)
        counted = p
        if self.budget.window is not None:
            counted = p.clone()
            counted[..., : max(0, new - self.budget.window), :] = 0
        got = self.got(layer, counted)
        if prompt and self.budget.kernel > 1:
            got[..., max(0, n - self.budget.window) if self.budget.window else n :] = 0
            got = F.avg_pool1d(got, self.budget.kernel, 1, self.budget.kernel // 2)
        layer["score"] = self.aged(torch.cat([score, torch.zeros(batch, kv_heads, new)], -1), new) + got
        whole = prompt or new > 1
        if whole:
            layer["prompt"] = n
            layer["limit"], layer["newest"] = self.budget.at(n, index)
        layer["alive"] = torch.stack([self.left(layer, b, alive[b], n, whole) for b in range(batch)])
        return out

    def weights(
        self, layer: dict[str, Any], q: Tensor, k: Tensor, scale: float, mask: Tensor | None, alive: Tensor
    ) -> Tensor:
        """Probabilities over what is left."""
        groups, (rows, columns) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
        seen = torch.arange(columns)[None] <= torch.arange(columns - rows, columns)[:, None]
        seen = seen[None, None] if mask is None else (mask if mask.dtype == torch.bool else mask == 0)
        return probabilities(q, k, scale, seen & alive.repeat_interleave(groups, 1)[:, :, None])

    def got(self, layer: dict[str, Any], p: Tensor) -> Tensor:
        """What keys get of ``p`` ``(batch, kv_heads, groups, queries, keys)``."""
        return p.sum((2, 3))

    def aged(self, score: Tensor, tokens: int) -> Tensor:
        return score

    def left(self, layer: dict[str, Any], b: int, alive: Tensor, n: int, whole: bool) -> Tensor:
        """Which tokens of one sequence stay, ``(kv_heads, n)``: all heads together after several tokens, else of each one."""
        heads, score, kept = len(alive), layer["score"][b], torch.zeros_like(alive)
        here = [alive[h].nonzero()[:, 0].tolist() for h in range(heads)]
        stays = [{t for t in here[h] if t >= n - layer["newest"] or t < self.budget.sinks} for h in range(heads)]
        if whole:
            layer.setdefault("limits", {})[b] = [layer["limit"] + self.budget.answer] * heads
            limits = [layer["limit"]] * heads
        else:
            limits = layer["limits"][b]

        def best(h: int) -> list[int]:
            return sorted(here[h], key=lambda t: (t in stays[h], float(score[h, t])), reverse=True)

        chosen = [set(best(h)[: limits[h]]) for h in range(heads)]
        if whole and self.budget.safeguard is not None:
            sure = [set(best(h)[: int(self.budget.safeguard * layer["limit"] + 1e-6)]) | stays[h] for h in range(heads)]
            pairs = [(h, t) for h in range(heads) for t in here[h]]
            pairs.sort(key=lambda one: (one[1] in sure[one[0]], float(score[one[0], one[1]])), reverse=True)
            pairs = pairs[: layer["limit"] * heads]
            chosen = [{t for g, t in pairs if g == h} for h in range(heads)]
            spare = (layer["limit"] * heads - len(pairs)) // heads
            layer["limits"][b] = [len(one) + spare + self.budget.answer for one in chosen]
        for h in range(heads):
            kept[h, sorted(chosen[h])] = True
        return kept


class A2SF(Evicting):
    """The card's ``a2sf_scores``."""

    def __init__(self, budget: Budget, factor: float) -> None:
        super().__init__(budget)
        self.factor = factor

    def got(self, layer, p):
        weight = self.factor ** torch.arange(p.shape[3] - 1, -1, -1, dtype=torch.float32)
        return torch.einsum("bhgqk,q->bhk", p, weight)

    def aged(self, score, tokens):
        return score * self.factor**tokens


class Keyformer(Evicting):
    """The card's ``keyformer_score``; of ``log p``, which differs from the scores by a number for each query."""

    def __init__(self, budget: Budget, answer: int, start: float = 1.0, end: float = 2.0, seed: int | None = 0) -> None:
        super().__init__(budget)
        self.answer, self.start, self.end, self.seed = answer, start, end, seed

    def got(self, layer, p):
        heads, groups, rows, n = p.shape[1:]
        tau = self.start + layer["step"] * (self.end - self.start) / self.answer
        zeta = torch.zeros(heads, groups, rows, n)
        if self.seed is not None:
            for h in range(heads):
                for g in range(groups):
                    query = torch.arange(n - rows, n)[:, None]
                    zeta[h, g] = gumbel(query, h * groups + g, torch.arange(n) + self.seed * 1_000_003)
        return torch.nan_to_num(((p.log() + zeta) / tau).softmax(-1)).sum((2, 3))


class Renumbered(Evicting):
    """StreamingLLM's positions within the cache, by distance: of what is left, the newest is next to the first new token."""

    def __init__(self, budget: Budget, model: Any, padding: Tensor) -> None:
        super().__init__(budget)
        self.model, self.left_out = model, (padding == 0).sum(-1).tolist()
        self.raw: dict[int, list[Tensor]] = {}
        for index, block in enumerate(model.model.layers):
            seen = self.raw.setdefault(index, [])
            block.self_attn.k_proj.register_forward_hook(lambda _, x, out, seen=seen: seen.append(out.detach()))

    def weights(self, layer, q, k, scale, mask, alive):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        old = k.shape[2] - q.shape[2]
        raw = torch.cat(self.raw[layer["index"]], 1).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        keys = k.clone()
        for b in range(k.shape[0]):
            for h in range(k.shape[1]):
                here = alive[b, h, :old].nonzero()[:, 0]
                at = old - len(here) + torch.arange(len(here)) - self.left_out[b]
                cos, sin = self.model.model.rotary_emb(raw, at.clamp_min(0)[None])
                one = raw[b, h, here][None, None]
                keys[b, h, here] = apply_rotary_pos_emb(one, one, cos, sin)[1][0, 0]
        return super().weights(layer, q, keys, scale, mask, alive)


class ZipVL(MiKV):
    """The card's ``zipvl_select`` for the cache, with probes by the same lots; ``bits=None`` drops what is not important.

    ``most``: tokens that there is room for besides the newest, of the tokens so far.
    """

    def __init__(
        self, threshold: float, newest: int, most: float, bits: int | None, probes: tuple[int, int] = (4, 4)
    ) -> None:
        super().__init__(0, newest, bits or 2)
        self.threshold, self.newest, self.most, self.drops, self.probes = threshold, newest, most, bits is None, probes

    def weights(self, layer, q, k, scale, mask, alive, first):
        if self.drops:
            return self._masked(q, k, scale, mask, alive)
        return super().weights(layer, q, k, scale, mask, alive, first)

    def output(self, layer, p, v, alive, first):
        return mixed(p, v) if self.drops else super().output(layer, p, v, alive, first)

    def attend(self, layer, q, k, v, scale, mask, index):
        batch, heads, n, _ = k.shape
        new, first = q.shape[2], "alive" not in layer
        alive = torch.cat(
            [layer.get("alive", torch.zeros(batch, heads, 0, dtype=torch.bool)), torch.ones(batch, heads, new).bool()],
            -1,
        )
        score = torch.cat([layer.get("score", torch.zeros(batch, 0)), torch.zeros(batch, new)], -1)
        p = self.weights(layer, q, k, scale, mask, alive, first)
        out = self.output(layer, p, v, alive, first)
        at = torch.arange(n)
        last, others = self.probes
        probe = (at >= n - last) | (drawn(at, 0) * n < others)
        got = (p * probe[n - new :, None]).sum((1, 2, 3))
        if first:
            a = got
            nnz = torch.tensor([int(probe[j:].sum()) for j in range(n)]).clamp_min(1)
            score = a / nnz * (n - at)
        else:
            score = score + got
            a = score
        if first or new > 1:
            layer["limit"] = []
            for b in range(batch):
                here = alive[b, 0].nonzero()[:, 0]
                c = a[b, here].sort(descending=True).values.cumsum(0)
                count = int((c < self.threshold * c[-1] - 1e-6).sum()) + 1
                top = here[(score[b, here] / (n - here)).topk(count).indices].tolist()
                kept = set(top) | {t for t in here.tolist() if t >= n - self.newest}
                layer["limit"].append(min(max(len(kept), self.newest), int(self.most * n + 1e-6) + self.newest))
        left = torch.zeros_like(alive)
        for b in range(batch):
            here = alive[b, 0].nonzero()[:, 0].tolist()
            best = sorted(here, key=lambda t: (t >= n - self.newest, float(score[b, t]) / (n - t)), reverse=True)
            left[b, :, best[: layer["limit"][b]]] = True
        self.after(layer, q, k, v, left, first, p)
        layer["alive"], layer["score"] = left, score
        return out
