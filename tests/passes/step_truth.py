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
    """Stands in the place of a diffusers ``Attention`` and follows a plan of letters, one for each call.

    With ``calls`` each step is two calls, and what is shared across guidance is taken from the first. ``forced`` is the
    method that a search tries or has chosen, and whether anything is written.
    """

    def __init__(
        self, inner: nn.Module, letters: str, window: int, cond_first: bool = True, calls: bool = False
    ) -> None:
        super().__init__()
        self.inner, self.letters, self.window, self.cond_first, self.calls = inner, letters, window, cond_first, calls
        self.count, self.states = 0, ({}, {})
        self.forced: tuple[str, bool] | None = None

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.inner.heads
        parts = (self.inner.to_q(x), self.inner.to_k(x), self.inner.to_v(x))
        return tuple(p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)

    def _saves_residual(self, step: int) -> bool:
        for later in self.letters[step + 1 :]:
            if later in "FC":
                return False
            if later in "WX":
                return True
        return False

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.forced is not None:
            letter, writes = self.forced
            state = self.states[0] if writes else dict(self.states[0])
            return self._attend(hidden_states, METHOD[letter], state, letter in "FC")
        step, branch = divmod(self.count, 2) if self.calls else (self.count, 0)
        self.count += 1
        method, state = METHOD[self.letters[step]], self.states[branch]
        if self.calls and "ASC" in method:
            if branch:
                state.update(self.states[0] if method == "ASC" else {"O": self.states[0]["O"]})
                return state["O"]
            method = {"ASC": "FULL", "WA-RS+ASC": "WA-RS"}[method]
        return self._attend(hidden_states, method, state, self._saves_residual(step))

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


def fast_attention(
    model: nn.Module, methods: dict[str, str], window: int, cond_first: bool = True, calls: bool = False
) -> nn.Module:
    """A model whose attention modules follow ``methods``; the model is changed."""
    for path, letters in methods.items():
        parent, _, name = path.rpartition(".")
        inner = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, FastAttention(inner, letters, window, cond_first, calls))
    return model


class Greedy:
    """The card's plan search around a model: called once for each step, it tries, decides and returns the decided output."""

    def __init__(self, model: nn.Module, paths: tuple[str, ...], window: int, delta: float, candidates: str) -> None:
        self.model = fast_attention(model, dict.fromkeys(paths, ""), window)
        self.delta, self.candidates = delta, candidates
        self.letters = dict.fromkeys(paths, "")

    def __call__(self, **given: Any) -> Any:
        modules = [self.model.get_submodule(path) for path in self.letters]

        def out(letters: list[str], writes: bool = False) -> Any:
            for module, letter in zip(modules, letters, strict=True):
                module.forced = (letter, writes)
            return self.model(**given)

        chosen = ["F"] * len(modules)
        if self.letters[next(iter(self.letters))]:
            raw = out(chosen)[0]
            for b in range(len(modules)):
                for letter in self.candidates:
                    chosen[b] = letter
                    a, c = raw, out(chosen)[0]
                    loss = ((a - c) / (torch.max(a, c) + 1e-6)).abs().clip(0, 10).mean()
                    if loss < self.delta * (b + 1) / len(modules):
                        break
                else:
                    chosen[b] = "F"
        for path, letter in zip(self.letters, chosen, strict=True):
            self.letters[path] += letter
        return out(chosen, writes=True)


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


def denoise_by_calls(
    model: Callable[..., Any], given: dict[str, Any], times: list[float], seed: int = 0
) -> list[Tensor]:
    """The same with guidance as two calls of the model, which differ in all that is no latent."""
    latents = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
    made = []
    for time in times:
        call = {**given, "hidden_states": latents, "timestep": torch.full_like(given["timestep"], time)}
        other = {**call, "class_labels": given["class_labels"] + 3}
        with torch.no_grad():
            outs = [model(**c, return_dict=False)[0].clone() for c in (call, other)]
        made += outs
        latents = latents - 0.3 * (2 * outs[0] - outs[1])[:, : latents.shape[1]]
    return made


# --- TokenCache


def block_pred(f: Callable[[Tensor], Tensor], z: Tensor, cache: Tensor, keep: Tensor) -> Tensor:
    """A block that computes the tokens in ``keep`` among themselves; the others are the cached ones."""
    out = cache.clone()
    if len(keep):
        out[:, keep] = f(z[:, keep])
    return out


def soft_block(f: Callable[[Tensor], Tensor], z: Tensor, cache: Tensor, w: Tensor) -> Tensor:
    """The mixture that the predictor is trained with."""
    w = w[None, :, None]
    return w * f(z) + (1 - w) * cache


def token_schedule(
    table: Tensor, ratio: float, intervals: tuple[int, int], boundary: float, blocks: float, rotation: int
) -> tuple[list[set[int]], list[list[Tensor]]]:
    """By step the blocks that are pruned, and by step and block the tokens that are kept; ``table`` is [L, T, n]."""
    layers, steps, tokens = table.shape
    count = tokens - round(ratio * tokens)
    second = round(boundary * steps)
    full = {0, *range(0, second, intervals[0]), *range(second, steps, intervals[1])}
    pruned: list[set[int]] = []
    predictions = 0
    for step in range(steps):
        if step in full or count == tokens:
            pruned.append(set())
            continue
        mean = [table[layer, step].mean().item() for layer in range(layers)]
        least = sorted(range(layers), key=lambda layer: mean[layer])[: round(blocks * layers)]
        pruned.append({b for b in least if rotation == 0 or (b - predictions) % rotation})
        predictions += 1
    keep = [
        [torch.tensor(sorted(sorted(range(tokens), key=lambda i: -row[i])[:count]), dtype=torch.long) for row in rows]
        for rows in table.transpose(0, 1).tolist()
    ]
    return pruned, keep


class TokenBlock(nn.Module):
    """Stands in the place of a transformer block whose first argument is the stream of tokens."""

    def __init__(self, inner: nn.Module, number: int, pruned: list[set[int]], keep: list[list[Tensor]]) -> None:
        super().__init__()
        self.inner, self.number, self.pruned, self.keep = inner, number, pruned, keep
        self.step, self.cache = 0, torch.empty(0)
        if hasattr(inner, "norm1"):
            self.norm1 = inner.norm1  # DiT takes its embedding of the timestep from the first block

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return self.inner(z, *args, **given)

        selected = self.number in self.pruned[self.step]
        kept = self.keep[self.step][self.number]
        self.cache = block_pred(f, hidden_states, self.cache, kept) if selected else f(hidden_states)
        self.step += 1
        return self.cache


def token_cache(model: nn.Module, pruned: list[set[int]], keep: list[list[Tensor]]) -> nn.Module:
    """A diffusers model whose ``transformer_blocks`` follow a schedule; the model is changed."""
    for number, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[number] = TokenBlock(block, number, pruned, keep)
    return model
