"""A Llama without some channels and heads, built as a smaller Llama: what structured pruning must equal."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDTH, DIM = 96, 8  # a multiple of every number of heads, as Llama asks


def llama(seed: int, kv_heads: int = 2, groups: int = 2, hidden: int = 64, layers: int = 2, bias: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=hidden, num_hidden_layers=layers, head_dim=DIM,
        num_attention_heads=kv_heads * groups, num_key_value_heads=kv_heads, max_position_embeddings=128,
        initializer_range=0.25, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.25)
    return model


def smaller(model: Any, channels: Sequence[Tensor], groups: Sequence[Tensor]) -> Any:
    """The model with these channels and groups of heads of each layer alone."""
    config = copy.deepcopy(model.config)
    per_group = config.num_attention_heads // config.num_key_value_heads
    config.intermediate_size = len(channels[0])
    config.num_key_value_heads = len(groups[0])
    config.num_attention_heads = len(groups[0]) * per_group
    made = type(model)(config).eval()
    rows: dict[str, tuple[Tensor, int]] = {}
    for number, (kept, heads) in enumerate(zip(channels, groups, strict=True)):
        keys = _spread(heads, DIM)
        queries = _spread(heads, per_group * DIM)
        at = f"model.layers.{number}"
        rows |= {f"{at}.mlp.{n}": (kept, d) for n, d in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))}
        rows |= {f"{at}.self_attn.{n}_proj": (keys, 0) for n in "kv"}
        rows |= {f"{at}.self_attn.q_proj": (queries, 0), f"{at}.self_attn.o_proj": (queries, 1)}
    with torch.no_grad():
        for name, weight in made.named_parameters():
            theirs, (owner, _, part) = model.get_parameter(name), name.rpartition(".")
            index, dim = rows.get(owner, (None, 0))
            if index is not None and (part == "weight" or dim == 0):
                theirs = theirs.index_select(dim, index)
            weight.copy_(theirs)
    made.tie_weights()
    return made


def _spread(rows: Tensor, width: int) -> Tensor:
    return (rows[:, None] * width + torch.arange(width)).flatten()


def best(scores: Tensor, count: int) -> Tensor:
    """Rows that score highest, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def per_group(weight: Tensor, groups: int, dim: int) -> Tensor:
    """``(groups, n)``: the entries of a projection by the group of heads that they belong to."""
    return weight.movedim(dim, 0).unflatten(0, (groups, -1)).flatten(1)
