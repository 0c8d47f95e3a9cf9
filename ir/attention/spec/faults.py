"""Errors in the methods of a store, a format or a selection, told with the pass, the method and the attention.

These methods are traced long after their pass has run, for several layers at once: what torch says of two shapes that do not fit
names none of it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec, Format, Part, ScoreTap, Select, Store
from accelpass.ir.core.graph import known
from accelpass.ir.errors import AccelpassError, PassError

_KINDS: tuple[tuple[type[Part], str], ...] = (
    (Store, "store"), (Format, "format"), (Select, "select"), (ScoreTap, "store")  # a store's scores
)  # fmt: skip


class WrongResult(Exception):
    """A method gave what it should not; says what."""

    def __init__(self, part: Part, method: str, said: str) -> None:
        super().__init__(said)
        self.part, self.method = part, method


@contextmanager
def named(spec: AttentionSpec, site: str, expected: str) -> Iterator[None]:
    """Name what fails in a method of the spec's parts.

    Args:
        expected: the shapes that go in and come out, for the message.

    Raises:
        PassError: in place of anything that a part which some pass chose raises.
    """
    try:
        yield
    except AccelpassError:
        raise
    except Exception as cause:  # whatever a method of somebody else's may raise
        found = _where(cause)
        makers = {part: who for who, part in spec.edits}
        who = None if found is None else makers.get(_kind(found[0]))
        if found is None or who is None:
            raise
        part, method, line = found
        text = " ".join(str(cause).split())
        told = text if isinstance(cause, WrongResult) else f"{type(cause).__name__}: {text}"
        raise PassError(
            f"the pass {who!r}, {type(part).__name__}.{method} at {site or 'an unnamed attention'}: "
            f"{told}{line}; expected {expected}"
        ) from cause


def checked(part: Part, method: str, made: Any, wanted: Tensor) -> Tensor:
    """``made``, if it is a tensor of the shape and dtype of ``wanted``.

    Raises:
        WrongResult: it is not.
    """
    if not isinstance(made, Tensor):
        raise WrongResult(part, method, f"it returned {type(made).__name__}, no tensor")
    sizes = zip(made.shape, wanted.shape, strict=False)
    if made.dim() != wanted.dim() or any(known(a != b) for a, b in sizes) or made.dtype != wanted.dtype:
        raise WrongResult(part, method, f"it returned {shape_said(made)}")
    return made


def shape_said(tensor: Tensor) -> str:
    """``(1, 4, s0, 8) float16``."""
    sizes = ", ".join(map(str, tensor.shape))
    return f"({sizes}{',' if tensor.dim() == 1 else ''}) {str(tensor.dtype).removeprefix('torch.')}"


def shapes_said(tensors: Mapping[str, Tensor]) -> str:
    """Names and shapes."""
    return ", ".join(f"{name} {shape_said(tensor)}" for name, tensor in tensors.items())


def _where(cause: Exception) -> tuple[Part, str, str] | None:
    """The innermost method of a part that was running, and the line in it."""
    if isinstance(cause, WrongResult):
        return cause.part, cause.method, ""
    found = None
    for frame, line in traceback.walk_tb(cause.__traceback__):
        held = frame.f_locals.get("self")
        if isinstance(held, Part):
            found = held, frame.f_code.co_name, f" ({Path(frame.f_code.co_filename).name}:{line})"
    return found


def _kind(part: Part) -> str:
    return next((name for kind, name in _KINDS if isinstance(part, kind)), "")
