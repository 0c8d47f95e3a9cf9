"""STC: frames of a video compute what changed, and the language model reads what is new in them (arXiv 2512.00891)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.structure.vision import Tower, vision
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.sequence.prompt import NoPrompt
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Done, Record, Skip
from accelpass.passes.visual_tokens.frames.reuse import reuse, why_not_reused
from accelpass.passes.visual_tokens.visual import Left, VisualFilter

_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class STC(VisualFilter):
    """Images of a text are frames of a video: some reuse an earlier frame's activations, and each keeps its most novel tokens.

    "Streaming Token Compression" for streaming video language models. Frames come in chunks of ``chunk``; every ``interval``-th chunk is
    computed as it is. In the others each block of the tower computes keys of all tokens, and the rest (queries, values, the
    projection, the MLP) of the share ``update`` whose keys are least like those of the last frame of the chunk that was computed
    last; other tokens add to the stream what they added there. Before the language model each frame keeps the share ``keep``
    of its tokens that are least like the mean of the frame and that of all chunks so far, by Gaussians of five widths over the
    half of the channels that varies least in the chunk.

    A call's frames are one stream for each text, its memory begins with the call (the authors keep theirs across videos, and
    call the model for each chunk: what is computed is the same). Channels are chosen anew in each chunk, and the means of chunks
    are taken of these positions whatever channels they were, as the authors do.

    Attributes:
        keep: share of a frame's tokens that is read; the authors' 60 of 196.
        update: share of a frame's tokens that a reusing frame computes; 1 computes all.
        interval: every so many-th chunk is computed; 1 for all.
        chunk: frames of a chunk.

    Raises:
        OptionError: a share or a number out of range.
    """

    keep: float = 0.306
    update: float = 0.25
    interval: int = 2
    chunk: int = 1

    name: ClassVar[str] = "stc"
    summary: ClassVar[str] = "frames of a video reuse activations of earlier ones, and keep their most novel tokens"
    paper: ClassVar[str] = "STC, arXiv 2512.00891"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0, "interval": 1}

    def __post_init__(self) -> None:
        for share in ("keep", "update"):
            if not 0 < getattr(self, share) <= 1:
                raise self.fail(share, "a share above 0, at most 1, which is all tokens")
        for number in ("interval", "chunk"):
            if getattr(self, number) < 1:
                raise self.fail(number, "a number of at least 1")

    def apply(self, program: Program, record: Record) -> None:
        found = program.analysis(vision)
        tower = found.entries[0].tower if len(found.entries) == 1 else None
        texts = value(found.entries[0].node).shape[0] if tower is not None else 0
        super().apply(program, record)
        if tower is not None and self.interval > 1:
            self._reuse(program, record, tower, texts)

    @staticmethod
    def frames(images: Any, texts: Any) -> int:
        """Of each text.

        Raises:
            NoPrompt: texts have different numbers of them.
        """
        if not isinstance(images, int) or not isinstance(texts, int) or images % texts:
            raise NoPrompt(f"{images} frames of {texts} texts are not as many in each")
        return images // texts

    def _reuse(self, program: Program, record: Record, tower: Tower, texts: Any) -> None:
        """Let frames of a tower take activations from others, where a text has several."""
        path, images = f"{tower.path} blocks", value(tower.start).shape[0]
        try:
            if isinstance(wanted := record.wants(path), Skip):
                raise CannotResize(wanted.why)
            frames = self.frames(images, texts)
            if (why := why_not_reused(tower)) is not None:
                raise CannotResize(why)
            others = {f: last for f in range(images) if (last := self.taken_from(f, frames)) is not None}
            if not others:
                raise CannotResize(f"{frames} frame of a text, or one chunk: each is computed")
            count = max(1, int(tower.tokens * self.update))
            reuse(program, tower, [f for f in range(images) if f not in others], others, count)
        except (CannotResize, NoPrompt) as cause:
            record.skip(path, str(cause))
        else:
            record.take(path, Done(f"{len(others)} of {images} frames compute {count} of {tower.tokens} tokens"))

    def taken_from(self, frame: int, frames: int) -> int | None:
        """The frame that one takes activations from; None where it computes all."""
        text, at = divmod(frame, frames)
        number = at // self.chunk
        if number % self.interval == 0:
            return None
        return text * frames + (number // self.interval * self.interval + 1) * self.chunk - 1

    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        (entry,) = program.analysis(vision).entries
        frames, kept = (
            self.frames(value(tower.end).shape[0], value(entry.node).shape[0]),
            max(1, int(tower.patches * self.keep)),
        )
        if kept == tower.patches:
            raise NoPrompt(f"{tower.path}: all of its {tower.patches} patches are read")
        run = partial(novel, tower.patches, frames, self.chunk, kept, value(entry.node).shape[-1])
        return Left(inserted(program, before, run, entry.features)[0])


def novel(patches: int, frames: int, chunk: int, kept: int, width: int, features: Tensor) -> list[Tensor]:
    """Which tokens are read, of all frames one after the other: ascending int64 ``(videos * frames * kept,)``."""
    x, chosen = features.reshape(-1, frames, patches, width).float(), []
    total = x.new_zeros((x.shape[0], width // 2))
    for number, part in enumerate(x.split(chunk, 1), 1):
        spread = part.flatten(1, 2).var(1, unbiased=False)
        channels = (-spread).sort(dim=-1, descending=True, stable=True).indices[:, : width // 2]
        z = part.gather(-1, channels[:, None, None].expand(*part.shape[:3], -1))
        total = total + z.mean((1, 2))
        unit = F.normalize(z, dim=-1)
        memory = F.normalize(total / number, dim=-1)[:, None, None]
        score = _alike(unit, unit.mean(2, keepdim=True)) + _alike(unit, memory)
        rows = (-score).sort(dim=-1, descending=True, stable=True).indices[..., :kept]
        chosen.append(rows.sort(-1).values)
    every = torch.cat(chosen, 1).flatten(0, 1)
    return [(every + torch.arange(every.shape[0], device=x.device).unsqueeze(-1) * patches).flatten()]


def _alike(x: Tensor, mean: Tensor) -> Tensor:
    away = (x - mean).square().sum(-1)
    return torch.stack([(-away / (2 * width)).exp() for width in _WIDTHS]).sum(0)
