"""What an export may raise, and the check that its packages are there."""

from __future__ import annotations

from importlib.util import find_spec

from accelpass.ir.errors import AccelpassError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportError(AccelpassError):
    """A model that cannot be written as ONNX; says which operator, pass or file is in the way, and the remedy."""


def require_packages(*names: str) -> None:
    """Raise :class:`ExportError` if a package of the ``onnx`` extra is missing."""
    missing = [name for name in names or PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}; type: pip install 'accelpass[onnx]'")
