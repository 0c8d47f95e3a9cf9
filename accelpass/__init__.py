"""Acceleration passes from the literature for any PyTorch model, through ``torch.compile``.

Importing this package imports neither torch nor transformers: torch loads every backend it knows when one is asked
for by name, and a program that only compiles with Inductor should not pay for us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelpass.api.bisection import Bisection, bisect
    from accelpass.api.calibration import calibrate
    from accelpass.api.onnx_export import export_onnx
    from accelpass.api.packed import load, save
    from accelpass.api.stateful import read, reset, sampling_run, state, write
    from accelpass.api.step_search import search_steps
    from accelpass.backends.onnx.errors import ExportError
    from accelpass.caches.kv_cache import KVCache
    from accelpass.ir.errors import (
        AccelpassError,
        CacheError,
        GraphError,
        OptionError,
        PassError,
        PlanError,
        ReleasedWeightError,
        SpecConflict,
    )
    from accelpass.ir.transform.steps import StepError
    from accelpass.view.report import Report
    from accelpass.view.shrink_report import ShrinkReport, shrink_report
    from accelpass.view.surviving import SurvivingTokens, surviving_tokens

    __version__: str

__all__ = [
    "AccelpassError",
    "Bisection",
    "CacheError",
    "ExportError",
    "GraphError",
    "KVCache",
    "OptionError",
    "PassError",
    "PlanError",
    "ReleasedWeightError",
    "Report",
    "ShrinkReport",
    "SpecConflict",
    "StepError",
    "SurvivingTokens",
    "__version__",
    "bisect",
    "calibrate",
    "compile",
    "explain",
    "export_onnx",
    "load",
    "read",
    "refresh",
    "reset",
    "sampling_run",
    "save",
    "search_steps",
    "shrink_report",
    "state",
    "surviving_tokens",
    "write",
]

_ERRORS = "accelpass.ir.errors"
_HOMES = {
    "AccelpassError": _ERRORS,
    "CacheError": _ERRORS,
    "ExportError": "accelpass.backends.onnx.errors",
    "GraphError": _ERRORS,
    "OptionError": _ERRORS,
    "PassError": _ERRORS,
    "PlanError": _ERRORS,
    "ReleasedWeightError": _ERRORS,
    "ShrinkReport": "accelpass.view.shrink_report",
    "SpecConflict": _ERRORS,
    "StepError": "accelpass.ir.transform.steps",
    "SurvivingTokens": "accelpass.view.surviving",
    "surviving_tokens": "accelpass.view.surviving",
    "Report": "accelpass.view.report",
    "KVCache": "accelpass.caches.kv_cache",
    "Bisection": "accelpass.api.bisection",
    "bisect": "accelpass.api.bisection",
    "calibrate": "accelpass.api.calibration",
    "export_onnx": "accelpass.api.onnx_export",
    "load": "accelpass.api.packed",
    "save": "accelpass.api.packed",
    "shrink_report": "accelpass.view.shrink_report",
    "search_steps": "accelpass.api.step_search",
    "read": "accelpass.api.stateful",
    "reset": "accelpass.api.stateful",
    "sampling_run": "accelpass.api.stateful",
    "state": "accelpass.api.stateful",
    "write": "accelpass.api.stateful",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("accelpass")
    if name == "testing":
        return import_module("accelpass.testing")
    if name not in _HOMES:
        raise AttributeError(f"module 'accelpass' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    import torch

    from accelpass.passes.core.options import parse

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
    from accelpass.api.lookup import find
    from accelpass.view.report import Report

    return Report.of(find(fast))


def refresh(fast: Any) -> int:
    """Pack the weights anew at the next call; needed after writes through ``.data``, which no version counter sees.

    Weights whose floats were released cannot be packed anew and keep their packed form. Returns how many tensors of
    the model were looked at.
    """
    from accelpass.api.lookup import tensors_of
    from accelpass.ir.core.derived import DERIVED

    tensors = tensors_of(fast)
    DERIVED.forget(tensors)
    return len(tensors)
