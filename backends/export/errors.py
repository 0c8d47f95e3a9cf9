"""What the export of a model may raise."""

from __future__ import annotations

from accelpass.ir.errors import AccelpassError


class ExportError(AccelpassError):
    """A model that cannot be written to a file; says which operator, pass or file is in the way, and the remedy."""
