"""What the generic shrink cannot know, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_GEMMA4_TEXT = {
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,  # Full-attention layers have wider heads than sliding ones.
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA4_UNIFIED_TEXT = {"global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA3N_TEXT = {
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
}
_QWEN4_TEXT = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DOTS3_TEXT = {
    "head_dim": 8,
    "layer_types": ["indexed_attention", "sliding_attention"],
    # Sliding layers have sizes of their own; here they share the others'.
    "per_layer_config": {1: {"kv_lora_rank": 16, "head_dim": 24}},
}
_REFORMER = {
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [32, 32],
    "attn_layers": ["local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
    "hash_seed": 0,  # Hashing is random otherwise: two runs would disagree.
}
_SWIN = {"patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_CONVNEXT = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 64,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
}
_PERCEIVER_IMAGE = {**_PERCEIVER, "image_size": 8, "num_cross_attention_heads": 1}
_BLT_PART = {"num_key_value_heads": 4, "hidden_size_global": 64, "vocab_size": 128}

# Keyed by model type, or by kind/type where two kinds differ. Nested dicts are sub-configurations; a value of ...
# leaves the field to its default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "patch_size": 4,
        "vocab_size": 128,
        "encoder_hash_byte_group_vocab": 97,
        "encoder_config": _BLT_PART,
        "decoder_config": _BLT_PART,
        "global_config": {"num_key_value_heads": 4},
        "patcher_config": {"num_key_value_heads": 4},
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bit": {**_RESNET, "num_groups": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "cvt": {
        "patch_sizes": [7, 3, 3],
        "embed_dim": [32, 32, 64],
        "num_heads": [1, 2, 4],
        "depth": [1, 2, 3],  # The last stage reads its third drop rate, so it must have three layers.
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": _DOTS3_TEXT,
    "dots3_note_text": _DOTS3_TEXT,
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.4,
        "hidden_dim": 320,  # What the last convolution puts out at this width coefficient.
        "dropout_rate": 0.0,
    },
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "gemma3n_text": _GEMMA3N_TEXT,
    "gemma4": {"text_config": _GEMMA4_TEXT},
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified": {"text_config": _GEMMA4_UNIFIED_TEXT},
    "gemma4_unified_text": _GEMMA4_UNIFIED_TEXT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hiera": {
        "embed_dim": 16,
        "image_size": [64, 64],
        "patch_size": [7, 7],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 4],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "imagegpt": {"vocab_size": 65},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "levit": {
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "image_size": 64,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "ministral": {"head_dim": 16},
    "mobilevitv2": {"patch_size": 2},
    "image/perceiver": _PERCEIVER_IMAGE,
    "masked_lm/perceiver": _PERCEIVER,
    "qwen4_exp": _QWEN4_TEXT,
    "qwen4_exp_text": _QWEN4_TEXT,
    "reformer": _REFORMER,
    "resnet": _RESNET,
    "shieldgemma2": {
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
        "yes_token_index": 20,
        "no_token_index": 21,
    },
    "siglip2": {"vision_config": {"num_patches": 16}},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
}


def _words(config: Any, vocab: int = 128, tokens: int = 12) -> torch.Tensor:
    return torch.randint(16, vocab, (2, tokens))


def _codebooks(config: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, config.vocab_size, (2 * config.num_codebooks, 12))}


def _image_tokens(config: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, config.vocab_size - 1, (2, 12))}


def _patches(config: Any) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    shape = (2, 16, vision.num_channels * vision.patch_size**2)
    return {
        "pixel_values": torch.randn(shape),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _image_and_prompt(config: Any) -> dict[str, torch.Tensor]:
    words = _words(config)
    words[:, 1 : 1 + config.mm_tokens_per_image] = config.image_token_index
    return {"input_ids": words, "pixel_values": torch.randn(2, 3, 32, 32)}


INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "image/imagegpt": _image_tokens,
    "image/shieldgemma2": _image_and_prompt,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "image/siglip2": _patches,
}

_NO_ASSISTANT = (
    "attends only to another model's keys and values, and this transformers refuses a configuration without a layer "
    "that makes its own"
)
# Families with no tiny build, and why.
UNBUILDABLE: dict[str, str] = {
    "causal_lm/gemma4_assistant": _NO_ASSISTANT,
    "causal_lm/gemma4_unified_assistant": _NO_ASSISTANT,
    "causal_lm/gemma3n": "its vision tower needs the timm package; gemma3n_text is the language model alone",
    "image/dinat": "needs the natten package, which has no CPU wheel",
    "image/timm_wrapper": "a wrapper around the timm package, which is not a requirement of transformers",
}

_IMAGE_SIZES: dict[str, int] = {"levit": 64, "hiera": 64, "perceiver": 8, "mobilevitv2": 64, "mobilevit": 64}
_IMAGE_SIZES |= dict.fromkeys(("bit", "convnext", "convnextv2", "resnet"), 64)


def image_size(name: str) -> int:
    return _IMAGE_SIZES.get(name, 32)
