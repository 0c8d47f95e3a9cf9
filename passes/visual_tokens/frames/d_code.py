"""D-CoDe: few frames of a video and few tokens of each, merged where they are alike; a question in parts (arXiv 2510.08818).

Hu et al., "D-CoDe: Scaling Image-Pretrained VLMs to Video via Dynamic Compression and Question Decomposition", EMNLP 2025. How many
tokens are left depends on the video, so this runs on the host, between tower and language model: give what it returns as part of
``inputs_embeds``. It makes the text shorter than the frames would; the question in parts costs a run of the model for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.errors import OptionError


def chosen_frames(embeddings: Tensor, count: int, uniform: float = 0.85) -> list[int]:
    """The frames that are read, ascending: a share of them evenly spaced, the others each least like those chosen so far.

    Args:
        embeddings: of all frames, ``(frames, d)``; of any length, they are normalised.
        count: how many frames are read; ``uniform``: which share of these is evenly spaced (rho of the paper).

    Raises:
        OptionError: more frames than there are, or fewer than one; a share out of range; embeddings that are not finite.
    """
    if embeddings.dim() != 2 or not bool(embeddings.isfinite().all()):
        raise OptionError(
            f"embeddings {tuple(embeddings.shape)} are not finite numbers (frames, d); give one row for each frame"
        )
    frames = embeddings.shape[0]
    if not 1 <= count <= frames:
        raise OptionError(f"count={count} frames of {frames}; choose from 1 to {frames}, or give more frames")
    if not 0 < uniform <= 1:
        raise OptionError(f"uniform={uniform} is not supported; use a share above 0, at most 1")
    unit = F.normalize(embeddings.float(), dim=-1)
    alike = unit @ unit.T
    # Fewer than one evenly spaced frame would leave nothing that others could be unlike: then it is the first.
    chosen = torch.linspace(0, frames - 1, max(1, int(count * uniform)), dtype=torch.float64).long().tolist()
    chosen = list(dict.fromkeys(chosen))
    while len(chosen) < count:
        score = alike[:, chosen].mean(1)
        score[chosen] = float("inf")
        chosen.append(int(score.argmin()))
    return sorted(chosen)


def merged_tokens(x: Tensor, kept: int = 288, threshold: float = 0.8, compat: bool = False) -> Tensor:
    """A frame's tokens of largest norm, in descending order, with those that are alike merged: ``(at most kept, channels)``.

    Each token that is still there, in turn, becomes the mean of itself and the tokens that are as alike as ``threshold`` and still there,
    which go. Likeness is that of the tokens as they were.

    Args:
        x: ``(tokens, channels)``; kept: how many are looked at; threshold: a cosine, above 1 merges nothing.
        compat: as the released code does: tokens that have gone are averaged once more, and one whose first like token has gone goes too.

    Raises:
        OptionError: not ``(tokens, channels)`` of finite numbers, or ``kept`` below 1.
    """
    if x.dim() != 2 or not bool(x.isfinite().all()):
        raise OptionError(
            f"a frame {tuple(x.shape)} is not finite numbers (tokens, channels); give each frame by itself"
        )
    if kept < 1:
        raise OptionError(f"kept={kept} is not supported; use a number of tokens, at least 1")
    order = x.float().norm(dim=-1).sort(descending=True, stable=True).indices
    x = x[order[:kept]].clone()
    unit = F.normalize(x.float(), dim=-1)
    alike = (unit @ unit.T) >= threshold
    there = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for at in range(len(x)):
        if not there[at]:
            continue
        group = (alike[at] if compat else alike[at] & there).nonzero()[:, 0]
        if len(group) < 2:
            continue
        x[at] = x[group].mean(0)
        there[group[1:] if compat else group[group != at]] = False
    return x[there]


def video_tokens(
    features: Tensor, embeddings: Tensor, count: int, uniform: float = 0.85, kept: int = 288, threshold: float = 0.8, compat: bool = False,
) -> Tensor:  # fmt: skip
    """What is read of a video, ``(tokens, channels)``: the tokens of the chosen frames in their order, each frame merged.

    Args:
        features: of all frames as the language model reads them, ``(frames, tokens, channels)``; the rest is as above.

    Raises:
        OptionError: features and embeddings of different numbers of frames; see :func:`chosen_frames` and :func:`merged_tokens`.
    """
    if features.dim() != 3 or len(features) != len(embeddings):
        raise OptionError(
            f"features {tuple(features.shape)} are not (frames, tokens, channels) of {len(embeddings)} embeddings"
        )
    frames = chosen_frames(embeddings, count, uniform)
    return torch.cat([merged_tokens(features[frame], kept, threshold, compat) for frame in frames])


def answered_in_parts(
    ask: Callable[[str], str], question: str, parts: Callable[[str], Sequence[str]] | Sequence[str]
) -> str:
    """The answer to a question once its parts are answered: each part alone, then the question behind all parts and their answers.

    How the parts and the answers are worded is ours (inferred).

    Args:
        ask: answers a text about the video, whatever model and video it holds.
        parts: the parts, or what finds them (the paper asks another language model); with none the question is asked as it is.
    """
    found = parts(question) if callable(parts) else parts
    told = [f"{part} {ask(part)}" for part in found]
    return ask("\n".join([*told, question]))
