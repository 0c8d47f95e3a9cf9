"""ONNX files of rewritten graphs. Nothing is imported here: the packages that it needs are an extra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register_translation(op: Any, function: Callable[..., Any]) -> None:
    """Say how an operator of a pass is written in ONNX; see :func:`accelpass.backends.onnx.translation.translations.register_translation`."""
    from accelpass.backends.onnx.translation.translations import register_translation as register

    register(op, function)
