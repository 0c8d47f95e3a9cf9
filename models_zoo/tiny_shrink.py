"""How a Hugging Face configuration is made tiny without knowing the architecture.

A field is shrunk only if the configuration has it and its default is set: a default of None usually means "derived"
(a head size from the width) or "off" (a LoRA rank in a query projection), and both must stay so.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

# A wide initial distribution: with transformers' usual 0.02 and a width of 64, a branch adds a thousandth of the
# residual stream, and a pass that broke attention would hardly move the output.
WEIGHT_STD = 0.1

_WIDTH = ["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim", "word_embed_proj_dim"]
_LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
]
_HEADS = [
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "attention_heads",
    "decoder_attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "swa_num_attention_heads",
    "linear_num_value_heads",
    "conf_num_attention_heads",
    "index_n_heads",
]
_KV_HEADS = [
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "linear_num_key_heads",
    "num_query_groups",
]
_HEAD_DIM = [
    "head_dim",
    "kv_channels",
    "v_head_dim",
    "qk_nope_head_dim",
    "d_kv",
    "d_head",
    "swa_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "index_head_dim",
    "attention_head_size",
    "global_head_dim",
    "linear_head_dim",
]
_INNER = [
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "dff",
    "dim_ff",
    "d_ff",
    "d_inner",
    "mlp_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "feed_forward_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "hidden_dim",
    "shared_experts_intermediate_size",
]
_EXPERTS = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
_EXPERTS_USED = ["num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "top_k_experts"]
_SHARED = [
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "n_group",
    "topk_group",
    "num_expert_group",
]
_POSITIONS = [
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "model_max_length",
    "context_length",
    "original_max_position_embeddings",
    "max_source_positions",
    "max_target_positions",
]
_RANKS = ["kv_lora_rank", "q_lora_rank", "o_lora_rank"]
SMALL: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_KV_HEADS, 2),
    **dict.fromkeys(_HEAD_DIM, 16),
    **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_EXPERTS_USED, 2),
    **dict.fromkeys(_SHARED, 1),
    **dict.fromkeys(_POSITIONS, 64),
    **dict.fromkeys(_RANKS, 32),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "index_topk": 8,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
    "type_vocab_size": 2,
    "first_k_dense_replace": 1,
    "sliding_window": 8,
    "initializer_range": WEIGHT_STD,
    "init_std": WEIGHT_STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
# A class that switches on the kind of layer shows each kind once; the list is as long as there are kinds.
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types")
# No family has more kinds of layer than this.
_MOST_LAYERS = 6


def shrunk(config_class: type, overrides: dict[str, Any], default: Any = None) -> Any:
    """The smallest configuration of this class that keeps every kind of layer. Overrides may be nested, one dict per
    sub-configuration; ``default`` is an instance to start from when the class has required fields."""
    return config_class(**small_fields(config_class, overrides, default))


def small_fields(config_class: type, overrides: dict[str, Any], default: Any = None) -> dict[str, Any]:
    default = config_class() if default is None else default
    given: dict[str, Any] = {}
    for name in _field_names(config_class, default):
        value = _value(default, name)
        if name in SMALL and (value is not None or name in _KV_HEADS) and not isinstance(value, dict | bool):
            given[name] = _like(value, SMALL[name])
    if "qk_rope_head_dim" in given:
        # Latent attention: every head has its own keys, and the rotary half is what is called the head dimension.
        given |= {"head_dim": ..., "num_key_value_heads": given.get("num_attention_heads", ...)}
    kinds = _layer_kinds(config_class, default)
    if kinds and "num_hidden_layers" in given:
        given["num_hidden_layers"] = max(len(each) for each in kinds.values())
        given |= {name: _filled(each, given["num_hidden_layers"]) for name, each in kinds.items()}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            nested = overrides.get(name, {})
            given[name] = shrunk(type(part), nested, default=part) if isinstance(nested, dict) else nested
    plain = {k: v for k, v in overrides.items() if k not in getattr(config_class, "sub_configs", {})}
    return {k: v for k, v in (given | plain).items() if v is not ...}


def _field_names(config_class: type, default: Any) -> list[str]:
    declared = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    return sorted((declared | set(default.to_dict())) & (set(SMALL)))


def _value(config: Any, name: str) -> Any:
    """A field that differs from layer to layer cannot be read from the whole configuration; it still has a default."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return config.__dict__.get(name)


def _like(value: Any, small: Any) -> Any:
    """A width may be a list with one entry per stage, and an end token may be several."""
    if isinstance(value, list | tuple):
        return [small] * len(value) if isinstance(small, int) and len(value) > 1 else [small]
    if isinstance(small, int) and value in (0, 1):
        return min(value, small)  # One key head, one expert group: small already, and a kind of its own.
    return small


def _layer_kinds(config_class: type, default: Any) -> dict[str, list[str]]:
    declared = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    kinds = {}
    for name in _KINDS:
        value = _value(default, name)
        if name in declared and isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            kinds[name] = list(dict.fromkeys(value))[:_MOST_LAYERS]
            if len(kinds[name]) == 1:
                kinds[name] *= 2
    return kinds


def _filled(kinds: list[str], length: int) -> list[str]:
    return [kinds[i] if i < len(kinds) else kinds[-1] for i in range(length)]
