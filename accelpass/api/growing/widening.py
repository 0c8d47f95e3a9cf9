"""Mixtures of experts in which neighbouring layers share their experts: where the training of a ReXMoE begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.ir.errors import AccelpassError


class PooledExperts(nn.Module):
    """Routes tokens among the experts of several layers (ReXMoE, arXiv 2510.17483, section 3).

    Attributes:
        weight: of the router, ``(pool, width)``; rows in the order of the layers.
        candidates: ``(pool,)``, which experts may be chosen. A schedule that widens the choice during training writes to it.
        shared: the ``experts`` of the layers, whose parameters stay theirs.
    """

    candidates: Tensor

    def __init__(self, shared: Sequence[Any], own: int, gate: Tensor, top_k: int) -> None:
        super().__init__()
        counts = [len(experts.gate_up_proj) for experts in shared]
        start = sum(counts[:own])
        weight = torch.zeros(sum(counts), gate.shape[1], dtype=gate.dtype, device=gate.device)
        weight[start : start + counts[own]] = gate.detach()
        self.weight, self.top_k = nn.Parameter(weight), top_k
        candidates = torch.zeros(sum(counts), dtype=torch.bool, device=gate.device)
        candidates[start : start + counts[own]] = True
        self.register_buffer("candidates", candidates)
        self.shared = nn.ModuleList(shared)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first: Any = self.shared[0]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = (x @ self.weight.t()).float().masked_fill(~self.candidates, float("-inf")).softmax(-1)
        gates, chosen = scores.topk(self.top_k, -1)
        gates = (gates / gates.sum(-1, keepdim=True)).reshape(-1, 1)
        ids = chosen.reshape(-1)
        up, down = (torch.cat([getattr(e, name) for e in self.shared]) for name in ("gate_up_proj", "down_proj"))
        rows = torch.bmm(up[ids], x.repeat_interleave(self.top_k, 0).unsqueeze(-1)).squeeze(-1)
        gate, rows = rows.chunk(2, -1)
        rows = first.act_fn(gate) * rows
        rows = torch.bmm(down[ids], rows.unsqueeze(-1)).squeeze(-1) * gates.to(x.dtype)
        return rows.view(len(x), self.top_k, -1).sum(1).reshape(hidden_states.shape)


def rex_widen(model: nn.Module, layers: int) -> list[str]:
    """Let groups of consecutive layers share their experts; the model computes what it did before.

    After ReXMoE (arXiv 2510.17483): the router of each layer gets a row for every expert of its group. The new rows are 0, and their experts may
    not be chosen until ``candidates`` of the layer's :class:`PooledExperts` says so: that is for training, without which the rows mean nothing.
    No weight of an expert is copied. The pass ``expert_pool`` joins the stacks once.

    Args:
        model: with transformers' Mixtral blocks; changed in place.
        layers: how many consecutive layers share; those that are left over at the end share among themselves.

    Returns:
        The paths of the blocks that were replaced.

    Raises:
        AccelpassError: ``layers`` is below 2, or the model has no two blocks of Mixtral's form with experts of one shape.
    """
    if layers < 2:
        raise AccelpassError(f"rex_widen: layers={layers!r} shares nothing; give 2 or more")
    blocks = [(path, m) for path, m in model.named_modules() if type(m).__name__ == "MixtralSparseMoeBlock"]
    if len(blocks) < 2:
        kinds = sorted({type(m).__name__ for m in model.modules() if "moe" in type(m).__name__.lower()})
        raise AccelpassError(
            f"rex_widen: {len(blocks)} blocks of Mixtral's form were found; other mixtures: {', '.join(kinds) or 'none'}"
        )
    sizes = {tuple(m.experts.gate_up_proj.shape[1:]) for _, m in blocks}
    if len(sizes) > 1:
        raise AccelpassError(
            f"rex_widen: experts differ in size between layers ({sorted(sizes)}), so layers cannot share them"
        )
    made: list[str] = []
    for start in range(0, len(blocks), layers):
        group: list[tuple[str, Any]] = blocks[start : start + layers]
        shared = [block.experts for _, block in group]
        for own, (path, block) in enumerate(group):
            pooled = PooledExperts(shared, own, block.gate.weight, block.top_k).train(block.training)
            model.set_submodule(path, pooled)
            made.append(path)
    return made


def candidates_at(step: int, start: int, end: int, own: int, pool: int) -> int:
    """How many of ``pool`` experts may be chosen at a training step (progressive scaling routing, section 3.2).

    ``own`` up to ``start``, all after ``end``, and linearly between.
    """
    if step <= start:
        return own
    return pool if step > end else int((1 + (pool / own - 1) * (step - start) / (end - start)) * own)


class ParameterAttention(nn.Module):
    """Attention over learned parameter tokens in the place of a linear (TokenFormer, arXiv 2410.23168, equation 4).

    ``GeLU(x K^T * tau / ||x K^T||_2) V``. ``tau`` is kept, not computed from the number of tokens: with it, tokens whose keys are 0 change
    nothing.

    Attributes:
        key_param_tokens, value_param_tokens: ``(tokens, in)`` and ``(tokens, out)``.
    """

    def __init__(self, keys: Tensor, values: Tensor, tau: float) -> None:
        super().__init__()
        self.key_param_tokens, self.value_param_tokens = nn.Parameter(keys), nn.Parameter(values)
        self.tau = float(tau)

    def get_extra_state(self) -> Tensor:
        """``tau``, which a state dict has beside the parameters."""
        return torch.tensor(self.tau, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.tau = float(state)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.key_param_tokens.t()
        norms = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
        return torch.nn.functional.gelu(scores / norms * self.tau) @ self.value_param_tokens


def grow_pattention(model: nn.Module, tokens: int, keep_function: bool = True) -> list[str]:
    """Append parameter tokens to every layer that is attention over such (TokenFormer); returns their paths.

    New values are random, of the spread of the old ones. Keys are 0, so that the model computes what it did before, or random, too, as in the
    paper's own runs, which train on from there.

    Args:
        model: with modules that have ``key_param_tokens`` and ``value_param_tokens`` (the authors' names), whose norm is
            ``l2_norm_gelu``; they are replaced, and the scale is kept as a number. Changed in place.
        tokens: how many each layer gets.
        keep_function: whether new keys are 0.

    Raises:
        AccelpassError: ``tokens`` is below 1, no such module, or one with another norm.
    """
    if tokens < 1:
        raise AccelpassError(f"grow_pattention: tokens={tokens!r} adds nothing; give 1 or more")
    found: list[tuple[str, Any]] = [
        (p, m) for p, m in model.named_modules() if hasattr(m, "key_param_tokens") and hasattr(m, "value_param_tokens")
    ]
    if not found:
        raise AccelpassError("grow_pattention: no module has key_param_tokens and value_param_tokens")
    odd = [(p, n) for p, m in found if (n := getattr(m, "norm_activation_type", "l2_norm_gelu")) != "l2_norm_gelu"]
    if odd:
        raise AccelpassError(f"grow_pattention: {odd[0][0]} has the norm {odd[0][1]!r}; only l2_norm_gelu can grow")
    for path, module in found:
        keys, values = module.key_param_tokens.detach(), module.value_param_tokens.detach()
        tau = getattr(module, "tau", len(keys) ** 0.5)
        new_keys, new_values = (torch.randn(tokens, *w.shape[1:]).to(w) * w.std() for w in (keys, values))
        if keep_function:
            new_keys.zero_()
        made = ParameterAttention(torch.cat([keys, new_keys]), torch.cat([values, new_values]), float(tau))
        model.set_submodule(path, made.to(keys).train(module.training))
    return [path for path, _ in found]
