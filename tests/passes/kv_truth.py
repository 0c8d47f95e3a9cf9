"""Eager oracles of the KV-cache methods, written from their cards, and what runs a whole transformers model with them.

An oracle is an attention function of transformers. It sees dense keys and values of all tokens so far (a DynamicCache), and
keeps for each layer which of them are left, and in which form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelpass import KVCache
from accelpass.testing.eager_cache import EagerAttention as Oracle
from accelpass.testing.eager_cache import attending as attending
from accelpass.testing.eager_cache import mixed, probabilities


def quant_rows(x: Tensor, bits: int, group: int) -> Tensor:
    """The card's per-token rounding, with step and lowest value as they are stored: in float16."""
    y = x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    low = y.amin(-1, True).half().float()
    step = ((y.amax(-1, True) - low) / (2**bits - 1)).half().float()
    code = ((y - low) / step.clamp_min(1e-8)).round().clamp(0, 2**bits - 1)
    return (code * step + low).reshape(x.shape)


def balancer(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """The card's, over real tokens (batch, tokens)."""
    groups = q.shape[1] // k.shape[1]
    qm = (q.abs() * real[:, None, :, None]).amax(2).view(q.shape[0], k.shape[1], groups, -1).amax(2)
    km = (k.abs() * real[:, None, :, None]).amax(2)
    return (qm / km.clamp_min(1e-6)).clamp_min(1e-6).sqrt()


class Dense(Oracle):
    def attend(self, layer, q, k, v, scale, mask, index):
        return mixed(probabilities(q, k, scale, mask), v)


class H2O(Oracle):
    """``alive``: tokens that are left. The same bookkeeping as the card's ``h2o_step``, on full-length tensors.

    Budgets are shares of the prompt, as floats, or tokens, as integers. ``mean``: scores are divided by how many tokens may
    see the key before they are compared, as in the card of ZipVL.
    """

    def __init__(
        self,
        heavy: float | int,
        recent: float | int,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
        mean: bool = False,
    ):
        super().__init__()
        self.heavy, self.recent, self.transform, self.mean = heavy, recent, transform, mean

    def attend(self, layer, q, k, v, scale, mask, index):
        batch, kv_heads, n, _ = k.shape
        new = q.shape[2]
        first = "alive" not in layer
        if first:
            layer["alive"] = torch.zeros(batch, kv_heads, 0, dtype=torch.bool)
            layer["score"] = torch.zeros(batch, kv_heads, 0)
        alive = torch.cat([layer["alive"], torch.ones(batch, kv_heads, new, dtype=torch.bool)], -1)
        score = torch.cat([layer["score"], torch.zeros(batch, kv_heads, new)], -1)
        p = self.weights(layer, q, k, scale, mask, alive, first)
        out = self.output(layer, p, v, alive, first)
        score = self.scored(layer, score, p)
        if first or new > 1:
            heavy, recent = (p if isinstance(p, int) else int(p * n + 1e-9) for p in (self.heavy, self.recent))
            layer["recent"] = max(1, recent)
            layer["limit"] = heavy + layer["recent"]
        kept = torch.zeros_like(alive)
        rank = score / torch.arange(n, 0, -1) if self.mean else score
        for b in range(batch):
            for h in range(kv_heads):
                here = alive[b, h].nonzero()[:, 0]
                if len(here) > layer["limit"]:
                    # Until several tokens come at once again, none of the newest has been evicted: the card's rule.
                    newest, rest = here[here >= n - layer["recent"]], here[here < n - layer["recent"]]
                    heavy = rest[rank[b, h, rest].topk(layer["limit"] - len(newest)).indices]
                    here = torch.cat([heavy, newest])
                kept[b, h, here] = True
        self.after(layer, q, k, v, kept, first, p)
        layer["alive"], layer["score"] = kept, score
        return out

    def scored(self, layer: dict[str, Any], score: Tensor, p: Tensor) -> Tensor:
        """Scores after new queries had the probabilities ``p``."""
        return score + p.sum((2, 3))

    def weights(self, layer, q, k, scale, mask, alive, first):
        keys = k if first else self.transform(k)
        return self._masked(q, keys, scale, mask, alive)

    def _masked(self, q, keys, scale, mask, alive):
        groups = q.shape[1] // keys.shape[1]
        rows, columns = q.shape[2], keys.shape[2]
        base = torch.arange(columns)[None] <= torch.arange(columns - rows, columns)[:, None]
        allowed = base[None, None] if mask is None else (mask if mask.dtype == torch.bool else mask == 0)
        allowed = allowed.expand(q.shape[0], q.shape[1], -1, -1) & alive.repeat_interleave(groups, 1)[:, :, None]
        return probabilities(q, keys, scale, allowed)

    def output(self, layer, p, v, alive, first):
        return mixed(p, v if first else self.transform(v))

    def after(self, layer, q, k, v, kept, first, p):
        pass


class MiKV(H2O):
    """Tokens that H2O would evict stay, rounded; their scores go on."""

    def __init__(self, heavy: float | int, recent: float | int, bits: int):
        super().__init__(heavy, recent)
        self.bits = bits

    def _rounded(self, layer, x, balance):
        group = x.shape[-1] // 2
        if not balance:
            return quant_rows(x, self.bits, group)
        b = layer["b"][:, :, None]
        return quant_rows(x * b, self.bits, group) / b

    def weights(self, layer, q, k, scale, mask, alive, first):
        whole = torch.ones_like(alive)
        keys = k if first else torch.where(alive[..., None], k, self._rounded(layer, k, True))
        p = self._masked(q, keys, scale, mask, whole)
        layer["all"] = p
        return p * alive[:, :, None, None]

    def output(self, layer, p, v, alive, first):
        values = v if first else torch.where(alive[..., None], v, self._rounded(layer, v, False))
        return mixed(layer["all"], values)

    def after(self, layer, q, k, v, kept, first, p):
        if first:
            layer["b"] = balancer(q, k, (p.sum((2, 3)) > 0).any(1))


class Tidal(Oracle):
    """The card's ``td_attend``; ``chosen`` is handed from layer to layer within a step."""

    def __init__(self, budget: int, *choosing: int, by: str = "layer"):
        super().__init__()
        self.budget, self.choosing, self.by = budget, choosing, by

    def attend(self, layer, q, k, v, scale, mask, index):
        batch, heads, rows, width = q.shape
        kv_heads, n = k.shape[1:3]
        groups = heads // kv_heads
        if rows > 1 or index < self.choosing[0]:
            return mixed(probabilities(q, k, scale, mask), v)
        allowed = torch.ones(batch, 1, 1, n, dtype=torch.bool) if mask is None else mask
        if index in self.choosing:
            s = torch.einsum("bhgd,bhjd->bhgj", q.view(batch, kv_heads, groups, width), k) * scale
            r = s.masked_fill(~allowed[:, :, :1], float("-inf"))
            r = r.softmax(-1).sum((1, 2))[:, None].repeat(1, kv_heads, 1) if self.by == "layer" else r.sum(2)
            r[..., n - 1] = float("inf")
            self.chosen = r.topk(min(self.budget, n), -1).indices
            return mixed(probabilities(q, k, scale, allowed), v)
        listed = torch.zeros(batch, kv_heads, n, dtype=torch.bool).scatter_(-1, self.chosen, True)
        return mixed(probabilities(q, k, scale, allowed & listed.repeat_interleave(groups, 1)[:, :, None]), v)


class TokenSelect(Oracle):
    """The card's ``ts_select`` with its ``SelectionCache``; single tokens alone select."""

    def __init__(self, budget: int, sinks: int, newest: int, reuse: float | None = None, kernel: int = 1):
        super().__init__()
        self.budget, self.sinks, self.newest, self.reuse, self.kernel = budget, sinks, newest, reuse, kernel

    def attend(self, layer, q, k, v, scale, mask, index):
        batch, heads, rows, _ = q.shape
        n, groups = k.shape[2], heads // k.shape[1]
        if rows > 1:
            layer.clear()
            return mixed(probabilities(q, k, scale, mask), v)
        seen = (
            torch.ones(batch, 1, 1, n, dtype=torch.bool)
            if mask is None
            else (mask if mask.dtype == torch.bool else mask == 0)
        )
        read = torch.zeros(batch, 1, 1, n, dtype=torch.bool)
        for b in range(batch):
            chosen = self.chosen(layer.setdefault(b, {}), q[b, :, 0], k[b].repeat_interleave(groups, 0), seen[b, 0, 0])
            read[b, ..., sorted({*range(min(self.sinks, n)), *chosen, *range(max(0, n - self.newest), n)})] = True
        return mixed(probabilities(q, k, scale, (seen & read).expand(-1, heads, -1, -1)), v)

    def chosen(self, cache: dict[str, Any], q: Tensor, k: Tensor, seen: Tensor) -> list[int]:
        flat, between = q.float().flatten(), range(self.sinks, k.shape[1] - self.newest)
        alike = "q" in cache and self.reuse is not None and torch.cosine_similarity(flat, cache["q"], 0) >= self.reuse
        if not alike:
            cache["q"], cache["rows"] = flat, []
            if len(between):
                middle = slice(between.start, between.stop)
                scores = torch.einsum("hd,hnd->hn", q.float(), k[:, middle].float())
                votes = torch.nan_to_num(scores.masked_fill(~seen[middle], float("-inf")).softmax(-1)).sum(0)
                if self.kernel > 1:
                    votes = torch.nn.functional.max_pool1d(votes[None, None], self.kernel, 1, self.kernel // 2)[0, 0]
                best = votes.topk(min(self.budget, len(between))).indices
                cache["rows"] = [self.sinks + int(t) for t in best]
        return [t for t in cache["rows"] if t in between]


class CSKV(Oracle):
    """Reconstructs from the layer inputs, which it watches, with the decomposition written out: ``V_r V_r^T`` of the weight."""

    def __init__(self, model: Any, rank: int, window: int):
        super().__init__()
        self.model, self.rank, self.window = model, rank, window
        self.inputs: dict[int, list[Tensor]] = {}
        for index, block in enumerate(model.model.layers):
            seen = self.inputs.setdefault(index, [])
            block.self_attn.k_proj.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].detach()))

    def _low(self, x: Tensor, weight: Tensor) -> Tensor:
        basis = torch.linalg.svd(weight.detach().double().t(), full_matrices=False)[2][: self.rank]
        return (x.double() @ weight.detach().double().t() @ basis.t() @ basis).float()

    def attend(self, layer, q, k, v, scale, mask, index):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        past = k.shape[2] - q.shape[2]
        if past == 0:
            return mixed(probabilities(q, k, scale, mask), v)
        attention = self.model.model.layers[index].self_attn
        x = torch.cat(self.inputs[index], 1)
        low_k, low_v = (
            self._low(x, p.weight).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
            for p in (attention.k_proj, attention.v_proj)
        )
        cos, sin = self.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        low_k = apply_rotary_pos_emb(low_k, low_k, cos, sin)[1]
        cut = (past if q.shape[2] > 1 else k.shape[2]) - self.window
        old = (torch.arange(k.shape[2]) < cut)[:, None]
        return mixed(probabilities(q, torch.where(old, low_k, k), scale, mask), torch.where(old, low_v, v))


@torch.no_grad()
def fed(model: Any, cache: Any, pieces: list[Tensor], padding: Tensor | None = None) -> Tensor:
    """The logits of each piece's last token, ``(pieces, batch, vocabulary)``; pieces go in one after the other."""
    out, seen = [], 0
    for piece in pieces:
        seen += piece.shape[1]
        extra = {}
        if padding is not None:
            left = torch.ones(piece.shape[0], seen, dtype=torch.long)
            left[:, : padding.shape[1]] = padding
            positions = (left.cumsum(-1) - 1).clamp_min(0)[:, -piece.shape[1] :]
            extra = {"attention_mask": left, "position_ids": positions}
        out.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **extra).logits[:, -1])
    return torch.stack(out)


def assisted_like_plain(model: Any, **options: Any) -> bool:
    """Whether guessed tokens leave no trace: answers to two prompts with prompt look-up, and without, are the same."""
    torch._dynamo.reset()
    model.compile(backend="accelpass", options={"lowering": "eager", **options})
    same = True
    for length in (21, 27):
        ids = torch.randint(0, 9, (1, length), generator=torch.Generator().manual_seed(length))
        given = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        plain, guessed = (
            model.generate(ids, past_key_values=KVCache(model, 64), **given, **more)
            for more in ({}, {"prompt_lookup_num_tokens": 3})
        )
        same &= torch.equal(plain, guessed)
    return same
