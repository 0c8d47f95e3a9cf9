"""Files that are no longer what was written, and machines that they are not for: told before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

import accelpass
from accelpass import DamagedPackageError, PackageError, ProcessorMismatchError, TorchMismatchError
from accelpass.backends.package import library
from accelpass.backends.package.file import processor
from accelpass.backends.package.file.manifest import DIGEST, MANIFEST
from tests.package.conftest import Packaged


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a library of a package that must be refused was loaded")

    monkeypatch.setattr(library, "library_runner", refuse)


def _rewritten(source: Path, target: Path, members: dict[str, bytes]) -> Path:
    """A copy with other contents of some members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, members.get(entry.filename.partition("/")[2], old.read(entry)))
    return target


def _with_manifest(source: Path, target: Path, **changed: Any) -> Path:
    """A copy whose manifest, and its digest, say something else."""
    with zipfile.ZipFile(source) as old:
        (name,) = [n for n in old.namelist() if n.endswith(MANIFEST)]
        content = json.loads(old.read(name)) | changed
    text = json.dumps(content).encode()
    return _rewritten(source, target, {MANIFEST: text, DIGEST: hashlib.sha256(text).hexdigest().encode()})


@pytest.mark.slow
def test_another_torch(mlp: Packaged, tmp_path: Path) -> None:
    file = _with_manifest(mlp.path, tmp_path / "m.pt2", torch="2.12.0+cpu")
    with pytest.raises(TorchMismatchError, match=r"is for torch 2.12.0\+cpu, and this is .* pip install torch==2.12.0"):
        accelpass.open(file)


def test_another_processor(mlp: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _with_manifest(mlp.path, tmp_path / "m.pt2", machine="Linux sparc64")
    with pytest.raises(ProcessorMismatchError, match="was compiled for Linux sparc64, and this is Linux"):
        accelpass.open(file)
    monkeypatch.setattr(processor, "instructions", lambda: ["sse2"])
    with pytest.raises(ProcessorMismatchError, match=r"a processor with .*avx.*, which this one does not have"):
        accelpass.open(mlp.path)


def test_instructions_are_those_that_a_compiler_chooses(tmp_path: Path) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text("processor : 0\nflags\t\t: fpu sse2 sse4a avx512_vnni clzero amx_int8 fma\n")
    assert processor.instructions(about) == ["amx_int8", "avx512_vnni", "fma", "sse2"]
    about.write_text("Features\t: fp asimd sve\n")
    assert processor.instructions(about) == ["asimd", "fp", "sve"]
    assert processor.instructions(tmp_path / "none") == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 0.99999])
def test_a_file_that_was_cut_short(mlp: Packaged, tmp_path: Path, share: float) -> None:
    content = mlp.path.read_bytes()
    file = tmp_path / "m.pt2"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DamagedPackageError, match=f"{file}"):
        accelpass.open(file)


@pytest.mark.parametrize("ending", [".so", "weights.bin", "_metadata.json"])
def test_a_changed_byte(mlp: Packaged, tmp_path: Path, ending: str) -> None:
    file = tmp_path / "m.pt2"
    shutil.copy(mlp.path, file)
    with zipfile.ZipFile(file) as opened:
        entry = next(e for e in opened.infolist() if e.filename.endswith(ending))
        content = opened.read(entry)
    whole = bytearray(file.read_bytes())
    whole[whole.index(content, entry.header_offset) + len(content) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(DamagedPackageError, match=f"{ending} is not what was written"):
        accelpass.open(file)


def test_a_changed_manifest(mlp: Packaged, tmp_path: Path) -> None:
    with pytest.raises(DamagedPackageError, match="its manifest was changed after it was written"):
        accelpass.open(_rewritten(mlp.path, tmp_path / "a.pt2", {MANIFEST: b"{}"}))
    odd = _with_manifest(mlp.path, tmp_path / "b.pt2", states="none")
    with pytest.raises(DamagedPackageError, match="not one that this accelpass reads: Expected `array`"):
        accelpass.open(odd)
    later = _with_manifest(mlp.path, tmp_path / "c.pt2", format=2)
    with pytest.raises(DamagedPackageError, match="has format 2, and this accelpass reads 1; install accelpass=="):
        accelpass.open(later)


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"there is no package .*none.pt2; 'accelpass package MODEL -o none.pt2'"):
        accelpass.open(tmp_path / "none.pt2")
    with pytest.raises(DamagedPackageError, match="cannot be read as a package"):
        accelpass.open(tmp_path)
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as opened:
        opened.writestr("a/data.pkl", b"x")
    with pytest.raises(
        DamagedPackageError, match=r"has no data/accelpass/manifest.json: it is no package of accelpass"
    ):
        accelpass.open(other)
