"""The shape of VoxCPM, small and random: a language model over patches of sound, with a diffusion transformer inside each step.

After the released code (OpenBMB/VoxCPM); nothing is trained, so that what it makes is noise. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FSQ(nn.Module):
    """Finite scalar quantization between two linears: each of ``latent`` channels is one of ``2 scale + 1`` values."""

    def __init__(self, width: int, latent: int, scale: int = 9) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.scale = nn.Linear(width, latent), nn.Linear(latent, width), scale

    def forward(self, h: Tensor) -> Tensor:
        return self.out_proj((torch.tanh(self.in_proj(h)) * self.scale).round() / self.scale)


class Block(nn.Module):
    """Attention over all of a few tokens, then an MLP."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.mlp_norm(x))))


class LocalDiT(nn.Module):
    """The velocity of a noisy patch ``(batch, tokens, channels)`` at a time, given a condition and the patch before it."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.in_proj, self.cond_proj = nn.Linear(channels, width), nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks, self.norm = nn.ModuleList([Block(width) for _ in range(2)]), nn.LayerNorm(width)
        self.out_proj, self.width = nn.Linear(width, channels), width

    def forward(self, x: Tensor, mu: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        rate = torch.exp(torch.arange(self.width // 2, device=x.device) * (-9.2 / (self.width // 2)))
        angle = 1000 * t[:, None] * rate
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        tokens = torch.cat([(mu + time)[:, None], self.cond_proj(cond), self.in_proj(x)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out_proj(self.norm(tokens[:, -x.shape[1] :]))


class PatchSpeaker(nn.Module):
    """One call is one step: a patch by ``steps`` steps of diffusion with guidance, then both language models with their caches.

    Args:
        trips: steps of Euler's method, from time 1 to 0; in the first, the velocity is 0 (CFG-zero*).
        guidance: scale of classifier-free guidance; 1 is the condition's own velocity.
    """

    def __init__(
        self, width: int = 32, channels: int = 8, tokens: int = 2, trips: int = 10, guidance: float = 2.0
    ) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.trips, self.guidance, self.tokens, self.channels = trips, guidance, tokens, channels
        config = LlamaConfig(
            vocab_size=8, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25,
        )  # fmt: skip
        self.config = config
        self.base_lm, self.residual_lm = LlamaModel(config), LlamaModel(config)
        self.fsq = FSQ(width, 16)
        self.lm_to_dit, self.res_to_dit = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.estimator = LocalDiT(width, channels)
        self.enc_in, self.enc, self.enc_out = nn.Linear(channels, width), Block(width), nn.Linear(width, width)
        self.stop_head = nn.Linear(width, 2)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor,
        patch: Tensor,
        noise: Tensor,
        position_ids: Tensor,
        base_cache: Any,
        residual_cache: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next patch, the stop head's logits ``(batch, 2)``, and the hidden states after it.

        Args:
            hidden, residual: ``(batch, width)``, of the step before.
            patch: the one before ``(batch, tokens, channels)``.
            noise: what diffusion begins with, of that shape.
            position_ids: ``(1, 1)``.
        """
        mu = self.lm_to_dit(hidden) + self.res_to_dit(residual)
        made = self.solve(mu, patch, noise)
        stop = self.stop_head(hidden)
        heard = self.enc_out(self.enc(self.enc_in(made)).mean(1))
        given = {"position_ids": position_ids, "use_cache": True}
        said = self.base_lm(inputs_embeds=heard[:, None], past_key_values=base_cache, **given).last_hidden_state[:, -1]
        said = self.fsq(said)
        more = self.residual_lm(
            inputs_embeds=(said + heard)[:, None], past_key_values=residual_cache, **given
        ).last_hidden_state[:, -1]
        return made, stop, said, more

    def read(self, prompt: Tensor, base_cache: Any, residual_cache: Any) -> tuple[Tensor, Tensor]:
        """The hidden states after the text's embeddings ``(batch, tokens, width)``; only patches are quantized."""
        said = self.base_lm(inputs_embeds=prompt, past_key_values=base_cache, use_cache=True).last_hidden_state
        more = self.residual_lm(inputs_embeds=said, past_key_values=residual_cache, use_cache=True).last_hidden_state
        # Laid out as a step's own results are, so that the first step is no graph of its own.
        said, more = (t[:, -1].clone(memory_format=torch.contiguous_format) for t in (said, more))
        return said, more

    def solve(self, mu: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        """Euler's method on the guided velocity; both halves of guidance are one batch, as in the released code."""
        times = torch.linspace(1, 0, self.trips + 1, device=noise.device)
        x, t, still = noise, times[0], max(1, int((self.trips + 1) * 0.04))
        for number in range(1, self.trips + 1):
            dt = t - times[number]
            if number > still:
                both = self.estimator(
                    torch.cat([x, x]),
                    torch.cat([mu, torch.zeros_like(mu)]),
                    t.expand(2 * len(x)),
                    torch.cat([cond, cond]),
                )
                wanted, without = both.chunk(2)
                x = x - dt * guided(wanted, without, self.guidance)
            t = t - dt
        return x


def guided(wanted: Tensor, without: Tensor, scale: float) -> Tensor:
    """CFG-zero*: guidance from the part of the unconditional velocity that points where the conditional one does."""
    c, u = wanted.flatten(1), without.flatten(1)
    share = ((c * u).sum(1) / (u * u).sum(1).clamp_min(1e-8))[:, None, None]
    return without * share + scale * (wanted - without * share)


def speaker(seed: int = 0, **sizes: Any) -> PatchSpeaker:
    """Random weights from ``seed``; what the caller draws afterwards is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchSpeaker(**sizes).eval()


@torch.no_grad()
def speak(
    model: PatchSpeaker,
    prompt: Tensor,
    caches: tuple[Any, Any],
    patches: int,
    *,
    call: Any = None,
    every: int = 4,
    seed: int = 0,
) -> Tensor:
    """Patches ``(batch, at most patches, tokens, channels)``, up to the one at which all texts have stopped.

    Args:
        prompt: embeddings of a text ``(batch, tokens, width)``, one token at least.
        caches: of the two language models, empty.
        call: the compiled model, if it is not compiled in place.
        every: the stop head is read on the host once in so many patches; what was made after the stop is cut off.
    """
    if patches < 1 or every < 1:
        raise ValueError(f"patches={patches}, every={every}: at least 1 of each")
    call, draw, (batch, start, _) = model if call is None else call, torch.Generator().manual_seed(seed), prompt.shape
    hidden, residual = model.read(prompt, *caches)
    size = (batch, model.tokens, model.channels)
    patch, made, stops = torch.zeros(size), list[Tensor](), list[Tensor]()
    for number in range(patches):
        noise, at = torch.randn(size, generator=draw), torch.tensor([[start + number]])
        patch, stop, hidden, residual = (t.clone() for t in call(hidden, residual, patch, noise, at, *caches))
        made.append(patch)
        stops.append(stop.argmax(-1) == 1)
        if (number + 1) % every == 0 or number + 1 == patches:
            ended = (torch.stack(stops).cumsum(0) > 0).all(1).nonzero()  # the one read in so many patches
            if len(ended):
                return torch.stack(made[: int(ended[0]) + 1], 1)
    return torch.stack(made, 1)
