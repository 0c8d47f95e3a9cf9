"""Files appear whole or not at all: everything is written and checked in a folder beside the target, then moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelpass.backends.export.errors import ExportError


def writable(path: str | os.PathLike[str], suffix: str) -> Path:
    """The target of an export.

    Raises:
        ExportError: it cannot be written there; found out before minutes of work.
    """
    target = Path(path).expanduser()
    if target.suffix != suffix:
        raise ExportError(f"{target} does not end in {suffix}; type: {target.name}{suffix}")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"{target} cannot be written: there is no folder {folder}; make it first")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the path of a file")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".accelpass-"):
            pass
    except OSError as cause:
        raise ExportError(f"{target} cannot be written: {cause.strerror}: {folder}; choose another folder") from None
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for files that belong together; they are moved to where it is if all goes well."""
    folder = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.stem}-"))
    try:
        yield folder
        # Weights first: a model that is there must find them.
        for file in sorted(folder.iterdir(), key=lambda f: (f.suffix == target.suffix, f.name)):
            os.replace(file, target.absolute().parent / file.name)
    except OSError as cause:
        raise ExportError(f"{target} cannot be written: {cause}; free some space or choose another folder") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)
