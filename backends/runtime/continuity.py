"""Whether the latents of a call come of earlier calls: what tells a sampling run's next step from another run's step.

A sampler makes the next latents of the last ones and of what the model gave for them. With a deterministic sampler the
next latents are a sum of these, with some weights; latents of another run, whatever its prompt, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 4
"""Steps back that are looked at: multistep solvers of order 4 are the highest in use."""
_SURE = 0.05
"""Of the change of the latents, the share that may stay unexplained in a proof; what is unrelated explains none of it."""
_ROOM = 8
"""Numbers in a sample for each tensor of the sum: with fewer, random ones would explain much of it by chance."""


@dataclass(eq=False)
class Past:
    """One step: the latents that the model was given, and its results, one for each call."""

    latents: Tensor
    results: list[Tensor]


@dataclass(frozen=True)
class Origin:
    """How far latents are explained.

    Attributes:
        proved: they are a sum of what the run had.
        alike: they have more in common with it than chance would give, as where the sampler adds noise or clips.
        still: they are the last latents.
    """

    proved: bool = False
    alike: bool = False
    still: bool = False


UNRELATED = Origin()


def result_of(made: Sequence[object], latents: Tensor) -> Tensor | None:
    """Which of a model's results the sampler steps with: the first that differs from the latents in channels at most."""
    return next((t for t in made if isinstance(t, Tensor) and _common([t, latents]) is not None), None)


@torch.no_grad()
def origin(latents: Tensor, past: Sequence[Past]) -> Origin:
    """Whether ``latents`` come of ``past``, the newest last. Entries that the step did not change are left out.

    The batch may be another one, as where guidance ends or begins.
    """
    if not past or latents.dim() != past[-1].latents.dim() or latents.device != past[-1].latents.device:
        return UNRELATED
    parts: list[Tensor] = []
    last = 0
    for step in reversed(past):
        mine = [step.latents, *step.results]
        # Guidance in one batch: each half's next latents are made of both halves' results.
        mine += [r.roll(len(r) // 2, 0) for r in step.results if len(r) % 2 == 0]
        fitted = [_batched(t, latents.shape[0]) for t in mine]
        if any(t is None for t in fitted):
            break
        parts += [t for t in fitted if t is not None]
        if len(parts) * _ROOM > latents[0].numel():
            parts = parts[: -len(fitted)]
            break
        last = last or len(parts)
    shape = _common([latents, *parts])
    if not parts or shape is None:
        return UNRELATED
    # Most samplers step from the last latents alone. What fewer tensors prove, more would: the others cost several times as much.
    found = _explained(latents, parts[:last], shape)
    return found if found.proved or last == len(parts) else _explained(latents, parts, shape)


def _explained(latents: Tensor, parts: Sequence[Tensor], shape: list[int]) -> Origin:
    """How far a sum of ``parts``, the last latents first, explains ``latents``, cut to ``shape``."""
    precision = torch.finfo(latents.dtype).eps
    now, *parts = [_cut(t, shape).flatten(1).float() for t in (latents, *parts)]
    moved = now != parts[0]
    change, now = now - parts[0], now * moved
    basis = torch.stack([p * moved for p in parts], -1)
    basis = basis / basis.norm(dim=1, keepdim=True).clamp_min(1e-12)
    q, _ = torch.linalg.qr(basis)
    rest = now - (q @ (q.mT @ now[..., None]))[..., 0]
    left, of_change, of_all = (t.norm(dim=1) for t in (rest, change, now))
    few = 2 * len(parts) / moved.sum(1).clamp_min(1)
    proved = left <= _SURE * torch.minimum(of_change, of_all) + 2 * precision * of_all
    alike = left**2 <= (0.9 - few) * of_all**2
    # A sample that stands still proves nothing, and speaks against nothing.
    stands = of_all == 0
    told = torch.stack([(proved & (few <= 2 / _ROOM)) | stands, alike | proved, stands])
    sure, similar, still = map(bool, told.all(1).tolist())
    return Origin(sure and not still, similar, still)


def _batched(t: Tensor, count: int) -> Tensor | None:
    """``t`` for a batch of ``count``: its first samples, or repeated."""
    if len(t) == count:
        return t
    if len(t) % count == 0:
        return t[:count]
    return t.repeat(count // len(t), *[1] * (t.dim() - 1)) if count % len(t) == 0 else None


def _common(tensors: Sequence[Tensor]) -> list[int] | None:
    """The sizes that all have; None if they differ in more than the number of channels and the batch."""
    shapes = [list(t.shape[1:]) for t in tensors]
    if not all(t.is_floating_point() for t in tensors) or len({len(s) for s in shapes}) != 1 or not shapes[0]:
        return None
    least = [min(sizes) for sizes in zip(*shapes, strict=True)]
    return least if sum(len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)) <= 1 else None


def _cut(t: Tensor, shape: list[int]) -> Tensor:
    """The first channels of ``t``."""
    for dim, size in enumerate(shape, 1):
        t = t.narrow(dim, 0, size)
    return t
