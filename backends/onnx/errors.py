"""The check that the packages of an ONNX export are there."""

from __future__ import annotations

from importlib.util import find_spec

from accelpass.backends.export.errors import ExportError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages(*names: str) -> None:
    """Raise :class:`ExportError` if a package of the ``onnx`` extra is missing."""
    missing = [name for name in names or PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}; type: pip install 'accelpass[onnx]'")
