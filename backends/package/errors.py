"""Why a package is not opened, or does not take a call."""

from __future__ import annotations

from accelpass.ir.errors import AccelpassError


class PackageError(AccelpassError, ValueError):
    """A package that cannot be used as asked: there is no such file, or a call does not fit what was compiled."""


class DamagedPackageError(PackageError):
    """A file that is no package, was cut short, or was changed after it was written."""


class TorchMismatchError(PackageError):
    """A package for another version of torch: its libraries call functions inside of torch, which move between versions."""


class ProcessorMismatchError(PackageError):
    """A package for a processor with instructions that this one does not have, on which the program would end at once."""
