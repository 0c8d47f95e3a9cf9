"""The file on disk: read without unpickling anything, every byte checked before it is used."""

from __future__ import annotations

import hashlib
import mmap
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from accelpass.backends.package.errors import DamagedPackageError, PackageError
from accelpass.backends.package.file.manifest import DIGEST, LIBRARIES, MANIFEST, TOKENIZER, WEIGHTS, Manifest, parsed

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""Of a zip file's member; its last two numbers are the lengths of the name and of the extra field that follow."""


class Archive:
    """A package that was found whole.

    Its weights stay in the file: they are mapped into memory, which processes on one machine share.

    Raises:
        PackageError: there is no such file.
        DamagedPackageError: it is no package, cut short, or changed after it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise PackageError(
                f"there is no package {path}; 'accelpass package MODEL -o {path.name}' makes one"
            ) from None
        except (OSError, ValueError) as cause:  # a folder; an empty file
            raise DamagedPackageError(f"{path} cannot be read as a package: {cause}") from None
        self._members = self._found()
        text = self._bytes(MANIFEST)
        if hashlib.sha256(text).hexdigest().encode() != bytes(self._bytes(DIGEST)):
            raise DamagedPackageError(f"{path}: its manifest was changed after it was written; package the model again")
        self.manifest: Manifest = parsed(bytes(text), str(path))

    def check(self) -> None:
        """Compare every member with the manifest.

        Raises:
            DamagedPackageError: one differs; names it.
        """
        for name, member in self.manifest.members.items():
            held = self._bytes(name)
            if len(held) != member.bytes or hashlib.sha256(held).hexdigest() != member.sha256:
                raise DamagedPackageError(
                    f"{self.path}: {name} is not what was written: the file was cut short or changed; package the model again"
                )

    def library(self, graph: str) -> dict[str, memoryview]:
        """The files of a graph, by their names."""
        folder = f"{LIBRARIES}{graph}/"
        return {n.removeprefix(folder): self._bytes(n) for n in self.manifest.members if n.startswith(folder)}

    def tokenizer(self) -> str | None:
        """The tokenizer as JSON; None if the package has none."""
        return bytes(self._bytes(TOKENIZER)).decode() if TOKENIZER in self.manifest.members else None

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as they lie in the file."""
        held = self._bytes(WEIGHTS)
        made = {}
        for name, weight in self.manifest.weights.items():
            dtype: torch.dtype = getattr(torch, weight.dtype)
            count = 1
            for size in weight.shape:
                count *= size
            flat = (
                torch.frombuffer(held, dtype=dtype, count=count, offset=weight.offset)
                if count
                else torch.empty(0, dtype=dtype)
            )
            made[name] = flat.reshape(weight.shape)
        return made

    def _found(self) -> dict[str, tuple[int, int]]:
        """Where members begin in the file and how long they are, by name without the archive's own."""
        try:
            with zipfile.ZipFile(self.path) as opened:
                entries = opened.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as cause:
            raise DamagedPackageError(f"{self.path} is no package, or only a part of one: {cause}") from None
        found = {}
        for entry in entries:
            at = entry.header_offset
            if at + _LOCAL_HEADER.size > len(self._map) or entry.compress_type != zipfile.ZIP_STORED:
                raise DamagedPackageError(f"{self.path}: {entry.filename} is not where the archive says")
            *_, name, extra = _LOCAL_HEADER.unpack_from(self._map, at)
            found[entry.filename.partition("/")[2]] = (at + _LOCAL_HEADER.size + name + extra, entry.file_size)
        return found

    def _bytes(self, name: str) -> memoryview:
        if name not in self._members:
            raise DamagedPackageError(
                f"{self.path} has no {name}: it is no package of accelpass, or only a part of one"
            )
        start, size = self._members[name]
        if start + size > len(self._map):
            raise DamagedPackageError(f"{self.path} ends inside of {name}; copy or package it again")
        return memoryview(self._map)[start : start + size]
