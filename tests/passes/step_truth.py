"""DiTFastAttn and TokenCache once more, eagerly, written from their cards: what the compiled passes are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METHOD = {"F": "FULL", "A": "AST", "W": "WA-RS", "X": "WA-RS+ASC", "C": "ASC"}


def band(tokens: int, reach: int) -> Tensor:
    at = torch.arange(tokens)
    return (at[:, None] - at[None, :]).abs() <= reach


class FastAttention(nn.Module):
    """Stands in the place of a diffusers ``Attention`` and follows a plan of letters, one for each call."""

    def __init__(self, inner: nn.Module, letters: str, window: int, cond_first: bool = True) -> None:
        super().__init__()
        self.inner, self.letters, self.window, self.cond_first = inner, letters, window, cond_first
        self.step, self.state = 0, {}

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.inner.heads
        parts = (self.inner.to_q(x), self.inner.to_k(x), self.inner.to_v(x))
        return tuple(p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)

    def _saves_residual(self) -> bool:
        for later in self.letters[self.step + 1 :]:
            if later in "FC":
                return False
            if later in "WX":
                return True
        return False

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        method, state = METHOD[self.letters[self.step]], self.state
        made = self._attend(hidden_states, method, state, self._saves_residual())
        self.step += 1
        return made

    def _attend(self, x: Tensor, method: str, state: dict[str, Tensor], saves: bool) -> Tensor:
        if method == "AST":
            return state["O"]
        batch, half = x.shape[0], "ASC" in method
        low = 0 if self.cond_first else batch // 2
        xs = x[low : low + batch // 2] if half else x
        q, k, v = self._qkv(xs)
        mask = band(q.shape[2], self.window)
        if method.startswith("WA"):
            rest = state["R"][low : low + batch // 2] if half else state["R"]
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) + rest
        else:
            h = F.scaled_dot_product_attention(q, k, v)
            if saves:
                r = h - F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                state["R"] = torch.cat([r, r]) if half else r
        y = self.inner.to_out[0](h.transpose(1, 2).flatten(2))
        y = torch.cat([y, y]) if half else y
        state["O"] = y
        return y


def fast_attention(model: nn.Module, methods: dict[str, str], window: int, cond_first: bool = True) -> nn.Module:
    """A model whose attention modules follow ``methods``; the model is changed."""
    for path, letters in methods.items():
        parent, _, name = path.rpartition(".")
        inner = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, FastAttention(inner, letters, window, cond_first))
    return model


def denoise(
    model: Callable[..., Any], given: dict[str, Any], times: list[float], guided: bool = True, seed: int = 0
) -> list[Tensor]:
    """The model's output at each step of a short run in which each output moves the latents."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(given["hidden_states"].shape, generator=generator)
    made = []
    for time in times:
        if guided:
            half = latents[: len(latents) // 2]
            latents = torch.cat([half, half])
        call = {**given, "hidden_states": latents, "timestep": torch.full_like(given["timestep"], time)}
        with torch.no_grad():
            out = model(**call, return_dict=False)[0]
        made.append(out.clone())
        latents = latents - 0.3 * out[:, : latents.shape[1]]
    return made


class DeltaBlock(nn.Module):
    """A block that adds what it added at an earlier step (ProfilingDiT's card; Taylor's first order on top)."""

    def __init__(self, inner: nn.Module, start: int, interval: int, taylor: bool) -> None:
        super().__init__()
        self.inner, self.start, self.interval, self.taylor = inner, start, interval, taylor
        self.step, self.deltas = 0, []
        self.norm1 = inner.norm1  # the model reads it of its first block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        since, self.step = self.step - self.start, self.step + 1
        if since < 0 or since % self.interval == 0:
            made = self.inner(hidden_states, *args, **kwargs)
            if since >= 0:
                self.deltas.append(made - hidden_states)
            return made
        delta = self.deltas[-1]
        if self.taylor and len(self.deltas) > 1:
            delta = delta + (since % self.interval) * (delta - self.deltas[-2]) / self.interval
        return hidden_states + delta
