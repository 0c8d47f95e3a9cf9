"""Decoders with a cache whose attention is more than causal: windows, soft caps, sinks, a bias of distances, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.models_zoo.small import VOCABULARY
from accelpass.testing.subjects import STEPS, Shape, Subject

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.25,
}  # fmt: skip
_PADDED = 5


def _of(family: str, **more: Any) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        import transformers

        settings: dict[str, Any] = {**_COMMON, **more}
        if family == "Bloom":
            settings = {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "n_layer": 2,
                "n_head": 4,
                "initializer_range": 0.25,
            }
        config = getattr(transformers, f"{family}Config")(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            for parameter in model.parameters():
                if not parameter.any() or not parameter.isfinite().all():  # sinks are uninitialised memory otherwise
                    nn.init.normal_(parameter, std=0.25)
        return model

    return build


def _decode(padded: bool) -> Callable[[Any, nn.Module, Shape], Iterator[Tensor]]:
    def drive(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
        from accelpass.caches.kv_cache import KVCache

        cache, ids = (
            KVCache(model, capacity=64, batch_size=2),
            Shape(2, shape.length, shape.seed).ids(VOCABULARY, STEPS),
        )
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :_PADDED] = 0
        places = (mask.cumsum(1) - 1).clamp_min(0)
        for start, end in [(0, shape.length), *((at, at + 1) for at in range(shape.length, shape.length + STEPS))]:
            more = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]} if padded else {}
            yield fast(input_ids=ids[:, start:end], past_key_values=cache, logits_to_keep=1, **more).logits

    return drive


def _subject(name: str, family: str, about: str, padded: bool = False, **more: Any) -> Subject:
    return Subject(
        f"mask: {name}", _of(family, **more), _decode(padded), causal=True, delimited=True, needs=("transformers",), about=about
    )  # fmt: skip


MASKED_DECODERS: tuple[Subject, ...] = (
    _subject("a window, with a cache", "Mistral", "a Mistral that sees its last 8 tokens", sliding_window=8),
    _subject(
        "soft caps and windows, with a cache", "Gemma2", "a Gemma 2, whose every second layer has a window", sliding_window=8,
        query_pre_attn_scalar=8,
    ),
    _subject(
        "sinks and windows, with a cache", "GptOss", "a gpt-oss, whose every second layer has a window", sliding_window=8,
        num_local_experts=2, num_experts_per_tok=1,
    ),
    _subject("distances (ALiBi), with a cache", "Bloom", "a Bloom"),
    _subject("padding on the left, with a cache", "Llama", f"a Llama; the second text is {_PADDED} tokens shorter", padded=True),
)  # fmt: skip
