"""Small random models that compile in a moment, each with what real ones of its kind have.

They are what passes are tested on: a pass author's conformance kit and the composition matrix run them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 64


class Mlp(nn.Module):
    """Two linears that read one input, a bias, a residual."""

    def __init__(self, width: int = 64, hidden: int = 96):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TinyLm(nn.Module):
    """Embedding tied to the output head around two MLPs."""

    def __init__(self, vocabulary: int = 128, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Mlp(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def tiny_lm(seed: int = 0) -> TinyLm:
    """No attention, and nothing beside torch is needed."""
    with _seeded(seed):
        return TinyLm().eval()


class Lexicon(TinyLm):
    """Texts as weights over a vocabulary (LexLIP): of each word the largest score of any token. Token 0 is padding."""

    def forward(self, ids: Tensor) -> Tensor:
        padding = (ids == 0).unsqueeze(-1).float()
        return torch.log1p(torch.relu(super().forward(ids) + padding * -1e6).amax(1))


def lexicon(seed: int = 0) -> Lexicon:
    """No attention, and nothing beside torch is needed."""
    with _seeded(seed):
        return Lexicon().eval()


def decoder(seed: int = 0, layers: int = 2) -> Any:
    """A Llama whose queries share keys: 4 heads, 2 key/value heads; needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25,
    )  # fmt: skip
    with _seeded(seed):
        return LlamaForCausalLM(config).eval()


class Pooled(nn.Module):
    """Two layers that choose among each other's experts (ReXMoE)."""

    def __init__(self, vocabulary: int = 128, width: int = 32, own: int = 3) -> None:
        super().__init__()
        self.embed, self.own = nn.Embedding(vocabulary, width), own
        self.routers = nn.ModuleList([nn.Linear(width, 2 * own, bias=False) for _ in range(2)])
        self.up = nn.ParameterList([nn.Parameter(torch.randn(own, 48, width) / 6) for _ in range(2)])
        self.down = nn.ParameterList([nn.Parameter(torch.randn(own, width, 48) / 6) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for router in self.routers:
            gates, chosen = router(x).softmax(-1).topk(2, -1)
            up, down = torch.cat(list(self.up)), torch.cat(list(self.down))
            rows, picked = x.flatten(0, 1).repeat_interleave(2, 0), chosen.flatten()
            rows = torch.bmm(up[picked], rows.unsqueeze(-1)).squeeze(-1).relu()
            rows = torch.bmm(down[picked], rows.unsqueeze(-1)).squeeze(-1) * gates.flatten().unsqueeze(-1)
            x = x + rows.unflatten(0, (-1, 2)).sum(1).view_as(x)
        return x


def pooled(seed: int = 0) -> Pooled:
    """Nothing beside torch is needed."""
    with _seeded(seed):
        return Pooled().eval()


class ParameterTokens(nn.Module):
    """Two projections that are attention over learnt keys and values, as TokenFormer's are."""

    def __init__(self, vocabulary: int = 128, width: int = 32, tokens: int = 40) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.keys = nn.ParameterList([nn.Parameter(torch.randn(tokens, width) / 2) for _ in range(2)])
        self.values = nn.ParameterList([nn.Parameter(torch.randn(tokens, width) / 4) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for keys, values in zip(self.keys, self.values, strict=True):
            scores = x @ keys.t()
            scores = scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(keys.shape[0])
            x = x + F.gelu(scores) @ values
        return self.head(x)


def parameter_tokens(seed: int = 0) -> ParameterTokens:
    """Nothing beside torch is needed."""
    with _seeded(seed):
        return ParameterTokens().eval()


class Recurrent(nn.Module):
    """One MLP applied again and again, which reads the embedding anew each time; its state settles."""

    def __init__(self, vocabulary: int = 128, width: int = 32, trips: int = 6) -> None:
        super().__init__()
        self.embed, self.trips = nn.Embedding(vocabulary, width), trips
        self.inner, self.again = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.inner.weight.mul_(0.4)

    def forward(self, ids: Tensor) -> Tensor:
        h = e = self.embed(ids)
        for _ in range(self.trips):
            h = torch.tanh(self.inner(h) + self.again(e))
        return self.head(h)


def recurrent(seed: int = 0) -> Recurrent:
    """Nothing beside torch is needed."""
    with _seeded(seed):
        return Recurrent().eval()


def experts(seed: int = 0, layers: int = 2, form: str = "batched_mm") -> Any:
    """A Mixtral with 4 experts in each layer, of which a token goes to 2; needs transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, initializer_range=0.25,
        sliding_window=None,
    )  # fmt: skip
    with _seeded(seed):
        model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(form)
    return model


def encoder(seed: int = 0, layers: int = 2) -> Any:
    """A BERT, whose tokens see each other both ways; needs transformers."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.25,
    )  # fmt: skip
    with _seeded(seed):
        return BertModel(config).eval()


def tower(seed: int = 0, layers: int = 2) -> Any:
    """A ViT that classifies images of 3 x 24 x 24: a class token and 16 patches; needs transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, image_size=24, patch_size=6,
        initializer_range=0.25, num_labels=10,
    )  # fmt: skip
    with _seeded(seed):
        return ViTForImageClassification(config).eval()


IMAGE = 9
"""The word in whose places :class:`Seeing` puts what it sees."""


class Seeing(nn.Module):
    """A Llama that reads words and the patches of images: a CLIP tower with a class token, a projector, masked scatter."""

    def __init__(self, layers: int = 2) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=6,
            initializer_factor=4.0,
        )  # fmt: skip
        self.tower, self.projector = CLIPVisionModel(config), nn.Linear(32, 32)
        self.text = decoder(layers=layers)
        self.config = self.text.config

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **given: Any) -> Any:
        embeds = self.text.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self.projector(self.tower(pixel_values).last_hidden_state[:, 1:])
            embeds = embeds.masked_scatter((input_ids == IMAGE).unsqueeze(-1), seen)
        return self.text(inputs_embeds=embeds, **given)


def seeing(seed: int = 0, layers: int = 2) -> Seeing:
    """An image is 16 words; needs transformers."""
    with _seeded(seed):
        return Seeing(layers).eval()


class _Attending(nn.Module):
    """A block as CLIP's and TiTok's code has it: the sequence is the first dimension."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class PieceTokenizer(nn.Module):
    """Images as a sequence of codes, and back (TiTok, One-D-Piece): ``latents`` codes of ``codes``, whatever the image's size.

    ``decode`` takes any number of the first codes.
    """

    def __init__(
        self, latents: int = 12, codes: int = 24, side: int = 24, patch: int = 6, width: int = 32, layers: int = 2, heads: int = 4,
        code_width: int = 6,
    ) -> None:  # fmt: skip
        super().__init__()
        scaled = lambda *size: nn.Parameter(torch.randn(*size) / 2)  # noqa: E731
        self.grid, self.patch = side // patch, patch
        patches = self.grid**2
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.encoder_places, self.latent_tokens = scaled(patches, width), scaled(latents, width)
        self.encoder = nn.ModuleList([_Attending(width, heads) for _ in range(layers)])
        self.narrow, self.wide = nn.Linear(width, code_width), nn.Linear(code_width, width)
        self.codebook, self.mask_token = nn.Embedding(codes, code_width), scaled(1, 1, width)
        self.decoder_places, self.latent_places = scaled(patches, width), scaled(latents, width)
        self.decoder = nn.ModuleList([_Attending(width, heads) for _ in range(layers)])
        self.norm, self.pixels = nn.LayerNorm(width), nn.Linear(width, 3 * patch**2)

    def encode(self, images: Tensor) -> Tensor:
        """Codes ``(images, latents)``."""
        x = self.patch_embed(images).flatten(2).mT + self.encoder_places
        x = torch.cat([x, self.latent_tokens.expand(x.shape[0], -1, -1)], 1).transpose(0, 1)
        for block in self.encoder:
            x = block(x)
        z = self.narrow(x.transpose(0, 1)[:, self.grid**2 :])
        z, table = (F.normalize(v, dim=-1) for v in (z.flatten(0, 1).float(), self.codebook.weight))
        away = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.t()
        return away.argmin(1).view(images.shape[0], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Images of their first codes ``(images, up to latents)``."""
        z = self.wide(F.normalize(self.codebook(codes), dim=-1)) + self.latent_places[: codes.shape[1]]
        mask = self.mask_token.repeat(codes.shape[0], self.grid**2, 1) + self.decoder_places
        x = torch.cat([mask, z], 1).transpose(0, 1)
        for block in self.decoder:
            x = block(x)
        x = self.pixels(self.norm(x.transpose(0, 1)[:, : self.grid**2]))
        x = x.view(-1, self.grid, self.grid, 3, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


def piece_tokenizer(seed: int = 0, **sizes: int) -> PieceTokenizer:
    """Nothing beside torch is needed."""
    with _seeded(seed):
        return PieceTokenizer(**sizes).eval()


def denoiser(seed: int = 0, layers: int = 2) -> Any:
    """A class-conditional DiT over latents of 4 x 8 x 8 (16 tokens); needs diffusers."""
    from diffusers import DiTTransformer2DModel

    with _seeded(seed):
        return DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, num_layers=layers, sample_size=8, num_embeds_ada_norm=10
        ).eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from ``seed``; what the caller draws afterwards is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
