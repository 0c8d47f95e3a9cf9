"""What each kind of score step computes. The op's reference and composed lowerings both run these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import Step

aten = torch.ops.aten
Run = Callable[[Tensor, Step, Sequence[Tensor]], Tensor]
STEPS: dict[str, Run] = {}


def step(kind: str) -> Callable[[Run], Run]:
    """Register what a kind of step computes."""

    def put(run: Run) -> Run:
        STEPS[kind] = run
        return run

    return put


def apply(x: Tensor, steps: Sequence[Step], extras: Sequence[Tensor]) -> Tensor:
    """Run ``steps`` on scores (or probabilities)."""
    for one in steps:
        x = STEPS[one.kind](x, one, extras)
    return x


def of_last(extras: Sequence[Tensor], rows: int, count: int = 1) -> list[Tensor]:
    """What steps of the last ``count`` of ``rows`` queries are given."""
    return [e[..., -count:, :] if e.dim() > 1 and e.shape[-2] == rows else e for e in extras]


@step("scale")
def _scale(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Times a constant."""
    return x * s.value


@step("offset")
def _offset(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Plus a constant."""
    return x + s.value


@step("add")
def _add(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Plus a tensor, ``value`` times it if given."""
    assert s.extra is not None
    return torch.add(x, extras[s.extra], alpha=1 if s.value is None else s.value)


@step("rsub")
def _rsub(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """A tensor minus the scores."""
    assert s.extra is not None
    return extras[s.extra] - x


@step("times")
def _times(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Times a tensor."""
    assert s.extra is not None
    return x * extras[s.extra]


@step("over")
def _over(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Divided by a tensor."""
    assert s.extra is not None
    return x / extras[s.extra]


@step("fill")
def _fill(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """``value`` (or the tensor ``other``) where the boolean tensor is true."""
    assert s.extra is not None
    mask = extras[s.extra]
    if s.other is not None:
        return torch.where(mask, extras[s.other], x)
    return x.masked_fill(mask, _number(s.value))


@step("keep")
def _keep(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """``value`` (or the tensor ``other``) where the boolean tensor is false."""
    assert s.extra is not None
    mask = extras[s.extra]
    if s.other is not None:
        return torch.where(mask, x, extras[s.other])
    return x.masked_fill(mask.logical_not(), _number(s.value))


@step("maximum")
def _maximum(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """The larger of score and tensor."""
    assert s.extra is not None
    return torch.maximum(x, extras[s.extra])


@step("clamp")
def _clamp(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Limited to [low, high]; either may be null."""
    low, high = s.value
    return x.clamp(low, high)


@step("cast")
def _cast(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """To another dtype."""
    return x.to(getattr(torch, s.value))


@step("softcap")
def _softcap(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """``value * tanh(x / value)``."""
    return torch.tanh(x / s.value) * s.value


@step("tanh")
def _tanh(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Squashed to (-1, 1)."""
    return torch.tanh(x)


@step("relu")
def _relu(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Negative scores to zero."""
    return torch.relu(x)


@step("center")
def _center(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Minus the largest of the row, which no softmax notices."""
    return x - x.amax(-1, keepdim=True)


@step("sink")
def _sink(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """More columns: at the end, or at the start if ``value`` is "first"."""
    assert s.extra is not None
    column = extras[s.extra]
    column = column.expand(*x.shape[:-1], column.shape[-1])
    return torch.cat([column, x] if s.value == "first" else [x, column], -1)


@step("drop")
def _drop(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Without columns: the last ``value``, or the first ``-value`` if it is negative."""
    return x[..., : -s.value] if s.value > 0 else x[..., -s.value :]


@step("view")
def _view(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Leading dimensions rearranged: ``value`` lists the new ones, all but the last two."""
    return x.reshape(*s.value, *x.shape[-2:])


@step("nan_to_num")
def _nan_to_num(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """What is not a number, or infinite, replaced."""
    return torch.nan_to_num(x, *s.value)


@step("softmax")
def _softmax(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Softmax over keys, in dtype ``value`` if given."""
    return torch.softmax(x, -1, dtype=getattr(torch, s.value) if s.value else None)


@step("safe_softmax")
def _safe_softmax(x: Tensor, s: Step, extras: Sequence[Tensor]) -> Tensor:
    """Softmax that gives zeros for a row without keys, as sdpa does."""
    return aten._safe_softmax.default(x, -1, getattr(torch, s.value) if s.value else None)


def _number(found: object) -> float:
    """JSON numbers, and the infinities that strict JSON has no word for."""
    return float(found)  # type: ignore[arg-type]
