"""Attention of a video in a band of its frames: a token sees those near its own place in every frame (arXiv 2505.22918)."""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, KERNELS
from accelpass.ir.attention.spec.block_select import Blocks


def why_no_frames(tokens: int, frame: int, text: int) -> str | None:
    """Why so many tokens are not ``text`` of words and then whole frames, or None."""
    if tokens > text and (tokens - text) % frame == 0:
        return None
    return f"its {tokens} tokens are not {text} of text and then frames of {frame} each"


def frame_band(
    q: Tensor, k: Tensor, v: Tensor, scale: float, frame: int, text: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Attention in which tokens of frames see each other if their places in their frames differ by ``reach`` at most.

    The first ``text`` tokens see all and are seen by all. What is of one place in all frames is put side by side, as one block:
    what is not seen is not computed.

    Args:
        q: ``(batch, heads, text + frames * frame, d)``; k, v: ``(batch, kv_heads, as many, d)``.

    Returns:
        The output, and the log-sum-exp of each query, float32 ``(batch, heads, tokens)``.
    """
    tokens, device = q.shape[2], q.device
    size = (tokens - text) // frame  # frames
    token = torch.arange(tokens, device=device)
    seen = tokens - text
    order = torch.where(token < seen, text + token % size * frame + token // size, token - seen)
    inside = token - text
    place = torch.where(token < text, seen + token, inside % frame * size + inside // frame)
    block = torch.arange(frame + -(-text // size), device=device)
    is_text = block >= frame
    near = (block.unsqueeze(-1) - block).abs() <= reach
    listed = Blocks.of((near | is_text | is_text.unsqueeze(-1)).unsqueeze(0), size)
    run = KERNELS.get(q.device.type, BLOCK_SPARSE)
    made, lse = run(
        *(x.index_select(2, order) for x in (q, k, v)), listed.blocks, listed.counts, size, -1, False, scale, None
    )
    return made.index_select(2, place), lse.index_select(2, place)
