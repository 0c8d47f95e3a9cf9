"""What GemFilter chooses, written from its card, and small decoders to run with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import accelpass

VOCABULARY, LAYERS, KEEP, LAYER, NEW = 96, 3, 8, 1, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
DECODER = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**DECODER)),
}


def built(family: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def compiled(model: Any, *others: Any, lowering: str = "eager", dynamic: bool | None = None, **options: Any) -> Any:
    passes = [{"name": "gemfilter", "keep": KEEP, "layer": LAYER, **options}, *others]
    return torch.compile(model, backend="accelpass", options={"lowering": lowering, "passes": passes}, dynamic=dynamic)


def prompt_of(batch: int, tokens: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens))


def gem_select(q_last: Tensor, keys: Tensor, k: int, ker: int = 5) -> Tensor:
    """The method card's oracle."""
    b, h, d = q_last.shape
    hkv, n = keys.shape[1], keys.shape[2]
    if n <= k:
        return torch.arange(n).expand(b, n)
    s = torch.einsum("bhgd,bhnd->bn", q_last.view(b, hkv, h // hkv, d), keys).float()
    s = F.avg_pool1d(s[:, None], ker, 1, ker // 2)[:, 0]
    return s.topk(k, -1).indices.sort(-1).values


@contextmanager
def spied(model: Any, layer: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries and keys of a layer, as an attention of transformers gets them."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            seen.append((query, key))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    yield seen
    model.set_attn_implementation(before)


@torch.no_grad()
def chosen(model: Any, ids: Tensor, padding: Tensor | None = None, layer: int = LAYER, keep: int = KEEP) -> Tensor:
    """The oracle's choice; of a padded batch, each sequence by itself."""
    rows = []
    for i, row in enumerate(ids):
        start = 0 if padding is None else int((padding[i] == 0).sum())
        with spied(model, layer) as seen:
            model(row[None, start:])
        q, k = seen[0]
        found = gem_select(q[:, :, -1], k, keep)[0] + start
        # Fewer tokens than are kept: padding fills up, in front.
        missing = keep - len(found)
        rows.append(torch.cat([torch.arange(start - missing, start), found]))
    return torch.stack(rows)


def answered(model: Any, ids: Tensor, cache: Any, padding: Tensor | None = None, **given: Any) -> Tensor:
    mask = torch.ones_like(ids) if padding is None else padding
    given = {"max_new_tokens": NEW, "do_sample": False, **given}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **given)


@torch.no_grad()
def logits(fast: Any, cache: Any, *pieces: Tensor) -> Tensor:
    return torch.stack([fast(p, past_key_values=cache, logits_to_keep=1).logits[:, -1] for p in pieces])


def steps(batch: int = 1, count: int = 4) -> list[Tensor]:
    return list(prompt_of(batch, count, seed=5).split(1, 1))


def said(fast: Any) -> dict[str, str]:
    return accelpass.explain(fast).passes["gemfilter"].skipped
