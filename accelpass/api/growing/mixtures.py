"""Mixtures whose experts are attentions and MLPs of dense models (BAM, arXiv 2408.08274)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AttentionExperts(nn.Module):
    """Several attentions of one input, all computed for every token, their results weighed by a router and added.

    ``sum_j softmax(h W^T)_j attention_j(h)`` (BAM, arXiv 2408.08274, section 3.2).

    Attributes:
        experts: the attentions; of shared keys and values, their projections are the same modules.
        router: ``(experts, width)``.
        shared: a cache keeps one set of keys and values, not one for each expert.
    """

    def __init__(self, experts: Sequence[nn.Module], width: int, shared: bool) -> None:
        super().__init__()
        self.experts, self.shared = nn.ModuleList(experts), shared
        self.router = nn.Linear(width, len(experts), bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        gates = self.router(hidden_states).softmax(-1)
        if self.shared and kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = _Once(kwargs["past_key_values"])
        made = None
        for number, expert in enumerate(self.experts):
            part = gates[..., number : number + 1] * expert(hidden_states, *args, **kwargs)[0]
            made = part if made is None else made + part
        assert made is not None
        return made, None


class _Once:
    """A cache that the first of several experts fills, and whose keys and values the others are given."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.held = cache, None

    def update(self, *given: Any, **more: Any) -> Any:
        if self.held is None:
            self.held = self.cache.update(*given, **more)
        return self.held


class MlpExperts(nn.Module):
    """Gated MLPs of which each token goes through the ``top_k`` that a router likes best, weighed by their probability.

    ``sum_i p_i mlp_i(h)`` with ``p = softmax(h W^T)``, not made to sum to 1 again (BAM, arXiv 2408.08274, section 2.1).

    Attributes:
        gate_up_proj, down_proj: ``(experts, 2 * hidden, width)`` and ``(experts, width, hidden)``.
    """

    def __init__(self, experts: Sequence[Any], top_k: int) -> None:
        super().__init__()
        up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts])
        self.gate_up_proj = nn.Parameter(up.detach())
        self.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in experts]).detach())
        self.router = nn.Linear(up.shape[2], len(experts), bias=False)
        self.act_fn, self.top_k = experts[0].act_fn, top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gates, chosen = self.router(x).softmax(-1).topk(self.top_k, -1)
        ids = chosen.reshape(-1)
        rows = torch.bmm(self.gate_up_proj[ids], x.repeat_interleave(self.top_k, 0).unsqueeze(-1)).squeeze(-1)
        gate, rows = rows.chunk(2, -1)
        rows = torch.bmm(self.down_proj[ids], (self.act_fn(gate) * rows).unsqueeze(-1)).squeeze(-1)
        return (rows * gates.reshape(-1, 1)).view(len(x), self.top_k, -1).sum(1).reshape(hidden_states.shape)
