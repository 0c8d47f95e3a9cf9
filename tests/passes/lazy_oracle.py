"""LazyLLM step by step, as its card has it: dictionaries of tokens, one sequence, plain torch on a Llama of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class LazyOracle:
    """State of one sequence. ``keep``: by block, the share of tokens that goes on after it."""

    model: torch.nn.Module
    keep: dict[int, float]
    kv: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=list)
    aux: list[dict[int, Tensor]] = field(default_factory=list)
    seen: int = 0
    survivors: dict[int, list[int]] = field(default_factory=dict)
    computed: int = 0
    """(token, block) pairs that went through a block."""

    def __post_init__(self) -> None:
        layers = len(self.model.model.layers)
        self.kv = [{} for _ in range(layers)]
        self.aux = [{} for _ in range(layers)]

    def step(self, ids: Tensor) -> Tensor:
        """Logits of the last of new tokens ``(tokens,)``."""
        core = self.model.model
        hidden = core.embed_tokens(ids)
        first, self.seen = self.seen, self.seen + len(ids)
        total = self.seen
        wanted = set(range(total))
        live = {first + i: h for i, h in enumerate(hidden)}
        for number, block in enumerate(core.layers):
            for t in sorted(wanted - self.kv[number].keys() - live.keys()):
                live[t] = self.aux[number - 1][t]
            rows = sorted(live)
            old = sorted((wanted & self.kv[number].keys()) - live.keys())
            out, weights = self._block(number, block, torch.stack([live[r] for r in rows]), rows, old)
            self.computed += len(rows)
            live = dict(zip(rows, out, strict=True))
            if number in self.keep:
                order = old + rows
                count = max(1, int(self.keep[number] * len(order)))
                score = dict(zip(order, weights.tolist(), strict=True))
                score[total - 1] = float("inf")  # the last token is one of those that go on
                best = set(sorted(order, key=lambda t: -score[t])[:count])
                for t, x in live.items():
                    if t not in best and t not in self.kv[number + 1]:
                        self.aux[number][t] = x
                # What is wanted and was not live here has its state from an earlier step.
                wanted &= best
                live = {t: x for t, x in live.items() if t in best}
                self.survivors[number] = sorted(best)
        return self.model.lm_head(core.norm(live[total - 1]))

    def _block(
        self, number: int, block: torch.nn.Module, x: Tensor, rows: list[int], old: list[int]
    ) -> tuple[Tensor, Tensor]:
        core, attn = self.model.model, block.self_attn
        width = attn.head_dim
        position = torch.tensor(rows).unsqueeze(0)
        normed = block.input_layernorm(x)
        q, k, v = (
            p(normed).view(1, len(rows), -1, width).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *core.rotary_emb(x, position))
        for i, r in enumerate(rows):
            self.kv[number][r] = (k[0, :, i], v[0, :, i])
        order = old + rows
        keys, values = (torch.stack([self.kv[number][t][i] for t in order], 1) for i in (0, 1))
        groups = q.shape[1] // keys.shape[0]
        scores = q[0] @ keys.repeat_interleave(groups, 0).transpose(1, 2) * attn.scaling
        later = torch.tensor(order)[None] > torch.tensor(rows)[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = (weights @ values.repeat_interleave(groups, 0)).transpose(0, 1).reshape(len(rows), -1)
        x = x + attn.o_proj(mixed)
        return x + block.mlp(block.post_attention_layernorm(x)), weights[:, -1].mean(0)
