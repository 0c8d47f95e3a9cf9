"""Every transformer of diffusers that can be built tiny from the names of its arguments, and inputs that it takes.

A class is constructed with its defaults but for sizes, which are told by name; its inputs are told by name from the
sizes it was given. How it wants its latents (a sequence, an image, frames before channels or after them) is found by
trying. A class that none of this builds is named in the report with what it raised last.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]

_HEADS, _HEAD, _CHANNELS, _TEXT, _LAYERS, _SIDE = 2, 16, 4, 32, 2, 8
_WIDTH = _HEADS * _HEAD
_LENGTH, _FRAMES, _ROWS = 6, 2, _SIDE * _SIDE // 4  # of the text, of a video, of latents as a sequence
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "num_cross_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads", "num_key_value_attention_heads"), _HEADS),
    **dict.fromkeys(("attention_head_dim", "head_dim", "cross_attention_head_dim", "d_kv"), _HEAD),
    **dict.fromkeys(("hidden_size", "dim", "d_model", "inner_dim", "embedding_dim", "global_states_input_dim"), _WIDTH),
    **dict.fromkeys(("cross_attention_dim", "cross_attention_input_dim"), _WIDTH),
    **dict.fromkeys(("text_embed_dim", "joint_attention_dim", "caption_channels", "text_dim", "cap_feat_dim"), _TEXT),
    **dict.fromkeys(("pooled_projection_dim", "encoder_hidden_size", "context_in_dim", "text_encoder_dim"), _TEXT),
    **dict.fromkeys(("caption_projection_dim", "in_visual_dim_text", "in_text_dim", "in_text_dim2"), _WIDTH),
    **dict.fromkeys(("in_channels", "out_channels", "in_visual_dim", "out_visual_dim"), _CHANNELS),
    **dict.fromkeys(("num_layers", "n_layers", "num_hidden_layers", "num_mmdit_layers"), _LAYERS),
    **dict.fromkeys(("num_single_layers", "num_single_dit_layers", "num_refiner_layers", "n_refiner_layers"), 1),
    **dict.fromkeys(("num_visual_blocks", "num_text_blocks", "num_double_layers", "num_layers_per_block"), 1),
    **dict.fromkeys(("ffn_dim", "intermediate_size", "ff_dim", "d_ff"), 2 * _WIDTH),
    **dict.fromkeys(("time_embed_dim", "freq_dim", "time_proj_dim", "model_dim"), _WIDTH),
    **dict.fromkeys(("sample_size", "sample_width", "sample_height", "pos_embed_max_size"), _SIDE),
    "sample_frames": _FRAMES,
    "norm_num_groups": 2,
    "max_text_seq_length": _LENGTH,
}
_PLACE = {
    "original_size": torch.tensor([[8, 8]] * 2),
    "target_size": torch.tensor([[8, 8]] * 2),
    "crop_coords": torch.zeros(2, 2),
}
_PARTICULAR: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AnyFlowTransformer3DModel": (
        {},
        {"timestep": torch.full((2, _FRAMES), 500), "r_timestep": torch.full((2, _FRAMES), 400)},
    ),
    "CogView3PlusTransformer2DModel": ({"condition_dim": 8}, _PLACE),
    "CogView4Transformer2DModel": ({"condition_dim": 8, "rope_axes_dim": (8, 8)}, _PLACE),
    "DiTTransformer2DModel": ({}, {"class_labels": torch.tensor([1, 2])}),
    "EasyAnimateTransformer3DModel": ({"in_channels": 4, "out_channels": 4, "patch_size": 2, "mmdit_layers": 1}, {}),
    "ErnieImageTransformer2DModel": (
        {"ffn_hidden_size": 64, "text_in_dim": _TEXT, "rope_axes_dim": (8, 4, 4)},
        {"text_bth": torch.randn(2, _LENGTH, _TEXT), "text_lens": torch.tensor([_LENGTH, 4])},
    ),
    "GlmImageTransformer2DModel": (
        {"condition_dim": 8, "prior_vq_quantizer_codebook_size": 16},
        {
            "prior_token_id": torch.randint(16, (2, _ROWS)),
            "prior_token_drop": torch.zeros(2, _ROWS, dtype=torch.bool),
            "target_size": _PLACE["target_size"],
            "crop_coords": _PLACE["crop_coords"],
        },
    ),
    "HeliosTransformer3DModel": ({"rope_dim": (8, 4, 4), "has_multi_term_memory_patch": False}, {}),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": [_TEXT, _TEXT],
            "text_emb_dim": _TEXT,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 1],
            "out_channels": 4,
        },
        {
            "timesteps": torch.tensor([500, 500]),
            "encoder_hidden_states_t5": torch.randn(2, _LENGTH, _TEXT),
            "encoder_hidden_states_llama3": torch.randn(2, 2, _LENGTH, _TEXT),
            "pooled_embeds": torch.randn(2, _TEXT),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "cross_attention_dim_t5": _TEXT,
            "pooled_projection_dim": 16,
            "text_len": _LENGTH,
            "text_len_t5": _LENGTH,
            "use_style_cond_and_image_meta_size": False,
            "activation_fn": "gelu-approximate",
        },
        {
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states_t5": torch.randn(2, _LENGTH, _TEXT),
            "text_embedding_mask": torch.ones(2, _LENGTH, dtype=torch.bool),
            "text_embedding_mask_t5": torch.ones(2, _LENGTH, dtype=torch.bool),
            "image_rotary_emb": (torch.ones(_ROWS, _HEAD), torch.zeros(_ROWS, _HEAD)),
        },
    ),
    "LTXVideoTransformer3DModel": (
        {"cross_attention_dim": _WIDTH},
        {"num_frames": 2, "height": 2, "width": 4, "encoder_attention_mask": torch.ones(2, _LENGTH)},
    ),
    "LatteTransformer3DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "caption_channels": _TEXT,
            "norm_elementwise_affine": False,
            "video_length": _FRAMES,
        },
        {},
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"audio_vocab_size": 32, "num_codebooks": 2},
        {"inputs_embeds": torch.randn(2, 5, _WIDTH)},
    ),
    "OmniGenTransformer2DModel": (
        {
            "vocab_size": 32,
            "pad_token_id": 0,
            "time_step_dim": 16,
            "max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "longrope"},
        },
        {
            "input_ids": torch.randint(1, 32, (2, _LENGTH)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, _LENGTH + 1 + _ROWS, _LENGTH + 1 + _ROWS),
            "position_ids": torch.arange(_LENGTH + 1 + _ROWS)[None].repeat(2, 1),
        },
    ),
    "PRXTransformer2DModel": ({"axes_dim": [8, 8], "depth": 2}, {"timestep": torch.tensor([0.5, 0.5])}),
    "PriorTransformer": (
        {"num_embeddings": _LENGTH, "embedding_dim": _WIDTH},
        {"hidden_states": torch.randn(2, _WIDTH), "encoder_hidden_states": torch.randn(2, _LENGTH, _WIDTH)},
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": _WIDTH,
            "depth": 2,
            "cond_token_dim": _TEXT,
            "global_cond_dim": _TEXT,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 2,
        },
        {"timestep": torch.tensor([0.5, 0.5]), "global_hidden_states": torch.randn(2, _TEXT), "local_add_cond": None},
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 8},
        {
            "encodings_and_masks": [(torch.randn(2, _LENGTH, _WIDTH), torch.ones(2, _LENGTH))],
            "decoder_input_tokens": torch.randn(2, 8, 8),
            "decoder_noise_time": torch.tensor([0.5, 0.5]),
        },
    ),
    "WanVACETransformer3DModel": (
        {"vace_layers": [0, 1], "vace_in_channels": 8},
        {"control_hidden_states": torch.randn(2, 8, _FRAMES, _SIDE, _SIDE)},
    ),
    "ZImageTransformer2DModel": (
        {"axes_dims": [8, 4, 4], "axes_lens": [64, 16, 16], "n_heads": 2, "n_kv_heads": 2},
        {
            "x": [torch.randn(4, 1, _SIDE, _SIDE)] * 2,
            "t": torch.tensor([0.5, 0.5]),
            "cap_feats": [torch.randn(_LENGTH, _TEXT)] * 2,
        },
    ),
    "BriaFiboTransformer2DModel": (
        {"text_encoder_dim": _TEXT // 2},
        {"text_encoder_layers": [torch.randn(2, _LENGTH, _TEXT // 2)] * 3},
    ),
    "JoyImageEditTransformer3DModel": ({"rope_dim_list": [8, 4, 4]}, {}),
    "Kandinsky5Transformer3DModel": (
        {"time_dim": _WIDTH, "axes_dims": (8, 4, 4)},
        {
            "hidden_states": torch.randn(1, _FRAMES, _SIDE, _SIDE, _CHANNELS),
            "encoder_hidden_states": torch.randn(1, _LENGTH, _WIDTH),
            "pooled_projections": torch.randn(1, _WIDTH),
            "timestep": torch.tensor([500.0]),
            "visual_rope_pos": [torch.arange(_FRAMES), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(_LENGTH),
        },
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": _WIDTH, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": _TEXT, "latent_dim": _CHANNELS},
        {
            "latent_cond": torch.randn(2, _ROWS, _CHANNELS),
            "attention_mask": torch.ones(2, _ROWS, dtype=torch.bool),
            "timestep": torch.tensor([0.5, 0.5]),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {"condition_dim": 8, "ff_inner_dim": 64, "rotary_dim": 8, "fourier_embedding_dim": 16},
        {"encoder_hidden_states": torch.randn(2, _ROWS, 8), "timestep": torch.tensor([0.5, 0.5])},
    ),
    "ChromaTransformer2DModel": (
        {"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 8},
        {},
    ),
}
"""By class: arguments of the constructor and inputs whose names or sizes say too little."""
_ROTARY = ("axes_dims_rope", "axes_dim_rope", "axes_dim", "axes_dims", "rope_axes_dim", "axes_lens")


def classes() -> dict[str, type[nn.Module]]:
    """diffusers' transformers by name."""
    from diffusers.models.modeling_utils import ModelMixin

    found = {}
    room = import_module("diffusers.models.transformers")
    for each in pkgutil.iter_modules(room.__path__):
        module = import_module(f"{room.__name__}.{each.name}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                found[name] = kind
    return dict(sorted(found.items()))


def _constructed(kind: type[nn.Module]) -> nn.Module:
    """A class's smallest model; the arguments are those of its signature whose names are known."""
    given: dict[str, Any] = {}
    for name, argument in inspect.signature(kind.__init__).parameters.items():
        if argument.default is None and name not in ("in_channels", "out_channels", "cross_attention_dim"):
            continue  # None means derived, or off
        if name in _SIZES:
            given[name] = _SIZES[name]
        elif name in _ROTARY and name != "axes_lens" and isinstance(argument.default, list | tuple):
            count = len(argument.default)  # even sizes that add up to a head
            rest = _HEAD - 4 * (count - 1)
            given[name] = type(argument.default)([rest] + [4] * (count - 1))
    torch.manual_seed(0)
    return kind(**{**given, **_PARTICULAR.get(kind.__name__, ({}, {}))[0]}).eval()


def _layouts(channels: int) -> Iterator[tuple[int, ...]]:
    yield (2, channels, _SIDE, _SIDE)
    yield (2, channels, _FRAMES, _SIDE, _SIDE)
    yield (2, _FRAMES, channels, _SIDE, _SIDE)
    yield (2, _ROWS, channels)
    yield (2, channels, _ROWS)


def _inputs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """What ``forward`` takes, by the names of its arguments; ids of positions for as many axes as the model rotates."""
    config: Any = model.config
    axes = next((len(config[k]) for k in _ROTARY if config.get(k) and k != "axes_lens"), 3)
    rows = torch.arange(_ROWS)
    grid = [rows // 4, rows % 4]
    width = lambda *names: next((config[n] for n in names if isinstance(config.get(n), int)), _TEXT)  # noqa: E731
    text = width("caption_channels", "text_embed_dim", "joint_attention_dim", "text_dim", "cross_attention_input_dim",
                 "cap_feat_dim", "in_text_dim", "context_in_dim", "cross_attention_dim")  # fmt: skip
    made: dict[str, Any] = {
        "hidden_states": torch.randn(shape),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, _LENGTH, text),
        "pooled_projections": torch.randn(2, width("pooled_projection_dim", "in_text_dim2")),
        "img_ids": torch.stack([torch.zeros(_ROWS)] * (axes - 2) + grid, dim=-1).float(),
        "txt_ids": torch.zeros(_LENGTH, axes),
        "guidance": torch.full((2,), 3.5) if config.get("guidance_embeds") else None,
        "encoder_attention_mask": torch.ones(2, _LENGTH, dtype=torch.bool),
        "encoder_hidden_states_mask": torch.ones(2, _LENGTH, dtype=torch.bool),
        "encoder_mask": torch.ones(2, _LENGTH, dtype=torch.bool),
        "class_labels": torch.tensor([1, 2]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "global_hidden_states": torch.randn(2, 1, width("global_states_input_dim")),
        "proj_embedding": torch.randn(2, _WIDTH),
        "img_shapes": [(1, 4, 4)] * 2,
        "txt_seq_lens": [_LENGTH] * 2,
        "num_frames": _FRAMES,
        "height": _SIDE // 2, "width": _SIDE // 2,
        "fps": torch.tensor([16, 16]),
        "timestep_r": torch.tensor([400, 400]), "r_timestep": torch.tensor([400, 400]),
    }  # fmt: skip
    arguments = inspect.signature(model.forward).parameters
    needless = {"class_labels", "encoder_attention_mask", "num_frames"}  # given only where they must be
    found = {
        name: made[name]
        for name, argument in arguments.items()
        if made.get(name) is not None and (argument.default is inspect.Parameter.empty or name not in needless)
    }
    found |= _PARTICULAR.get(type(model).__name__, ({}, {}))[1]
    return found | ({"return_dict": False} if "return_dict" in arguments else {})


def built(kind: type[nn.Module]) -> Built:
    """A tiny model with inputs that it answers; raises what the last of the layouts raised."""
    model = _constructed(kind)
    config: Any = model.config
    raised: Exception = TypeError("no layout")
    for shape in _layouts(config.get("in_channels") or _CHANNELS):
        given = _inputs(model, shape)
        try:
            with torch.no_grad():
                model(**given)
        except Exception as error:  # another layout, or one that the report names
            raised = error
        else:
            return model, given
    raise raised
