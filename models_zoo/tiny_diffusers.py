"""Tiny random diffusion transformers: what a denoising step calls, on small latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Pair = tuple[torch.nn.Module, dict[str, Any]]
_TEXT = 6  # tokens of prompt


def _step() -> torch.Tensor:
    return torch.tensor([500, 500])


def _dit() -> Pair:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    labels = torch.tensor([1, 2])
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": _step() % 10, "class_labels": labels}


def _pixart() -> Pair:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, caption_channels=32, num_layers=2,
        sample_size=8, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "timestep": _step(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3() -> Pair:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": _step(),
    }


def _flux() -> Pair:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    rows = torch.arange(16)
    return model, {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": _step() / 1000,
        "img_ids": torch.stack([torch.zeros(16), rows // 4, rows % 4], dim=-1).float(),
        "txt_ids": torch.zeros(_TEXT, 3),
        "guidance": torch.full((2,), 3.5),
    }


def _wan() -> Pair:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "timestep": _step(),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
    }


def _cogvideox() -> Pair:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=_TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "timestep": _step(),
    }


def _hunyuan_video() -> Pair:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "timestep": _step(),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "encoder_attention_mask": torch.ones(2, _TEXT, dtype=torch.long),
        "pooled_projections": torch.randn(2, 32),
        "guidance": torch.full((2,), 6000.0),
    }


def _ltx() -> Pair:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 3 * 4 * 4, 8),
        "encoder_hidden_states": torch.randn(2, _TEXT, 32),
        "timestep": _step(),
        "encoder_attention_mask": torch.ones(2, _TEXT),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    }


_BUILDERS: dict[str, Callable[[], Pair]] = {
    "cogvideox": _cogvideox,
    "dit": _dit,
    "flux": _flux,
    "hunyuan_video": _hunyuan_video,
    "ltx_video": _ltx,
    "pixart": _pixart,
    "sd3": _sd3,
    "wan": _wan,
}
NAMES = tuple(_BUILDERS)


def build(name: str) -> Pair:
    return _BUILDERS[name]()
