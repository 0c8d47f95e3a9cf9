"""Compile a model, ask what was done to it, and have its weights packed anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelpass.api.lookup import find, tensors_of
from accelpass.ir.core.derived import DERIVED
from accelpass.passes.core.options import parse
from accelpass.view.report import Report


def compile(
    model: Callable[..., Any],
    passes: Sequence[Any] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """``torch.compile(model, backend="accelpass", options=...)``, with the options checked now, not at the first call.

    Args:
        model: a module, which is returned wrapped and is not changed itself, or a function.
        passes: names, ``{"name": ..., option: value}`` or pass objects; None for the passes whose results are exact.
        fullgraph, dynamic: as in ``torch.compile``.
        options: as in :class:`accelpass.passes.core.options.Options`, and ``preset``.

    Raises:
        OptionError: an option, a pass or a field that does not exist or is out of range; names the nearest one.
    """
    if passes is not None:
        # Read once here and again at each compilation: an iterator would be empty by then.
        options["passes"] = (
            passes if isinstance(passes, str | dict) or not hasattr(passes, "__iter__") else list(passes)
        )
    parse(options)
    return torch.compile(model, backend="accelpass", options=options or None, fullgraph=fullgraph, dynamic=dynamic)


def explain(fast: Any) -> Report:
    """What was done to a compiled model, site by site, and why not more. Call the model once before.

    Args:
        fast: what ``torch.compile(..., backend="accelpass")`` returned, or a module compiled by ``Module.compile``.

    Raises:
        AccelpassError: nothing was compiled yet, or by another backend; says what to do.
    """
    return Report.of(find(fast))


def refresh(fast: Any) -> int:
    """Pack the weights anew at the next call; needed after writes through ``.data``, which no version counter sees.

    Weights whose floats were released cannot be packed anew and keep their packed form. Returns how many tensors of
    the model were looked at.
    """
    tensors = tensors_of(fast)
    DERIVED.forget(tensors)
    return len(tensors)
