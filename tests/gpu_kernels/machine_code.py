"""From a kernel to machine code for a GPU that is not there, and what that code takes of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from tests.gpu_kernels.sources import Variant


@dataclass(frozen=True)
class Chip:
    """A GPU: what Triton calls it, and the shared memory, in bytes, that one program may have."""

    name: str
    target: GPUTarget
    shared: int


CHIPS = (
    Chip("sm_80 (A100)", GPUTarget("cuda", 80, 32), 163 * 1024),
    Chip("sm_90 (H100, H200)", GPUTarget("cuda", 90, 32), 227 * 1024),
    Chip("sm_100 (B200)", GPUTarget("cuda", 100, 32), 227 * 1024),
    Chip("gfx942 (MI300)", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)


@dataclass(frozen=True)
class Taken:
    """What one program takes.

    Attributes:
        shared: bytes of shared memory (LDS on AMD).
        registers: of a thread; ``spilled``, bytes or registers of it that went to memory.
        warnings: what the compiler said.
    """

    shared: int
    registers: int
    spilled: int
    warnings: tuple[str, ...] = ()


def compiled(variant: Variant, chip: Chip) -> Any:
    """Triton's compiled kernel.

    Raises:
        Exception: whatever Triton raises for a kernel that the chip cannot run.
    """
    return triton.compile(variant.source, chip.target, variant.options)


def taken(built: Any, chip: Chip) -> Taken:
    """Registers and memory, as the vendor's assembler counts them."""
    if chip.target.backend == "hip":
        text = built.asm["amdgcn"]
        number = lambda name: int(found.group(1)) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0  # noqa: E731
        registers = number("vgpr_count") + number("agpr_count")
        return Taken(built.metadata.shared, registers, number("vgpr_spill_count") + number("sgpr_spill_count"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        arch = re.search(r"\.target\s+(\w+)", built.asm["ptx"])
        assert arch is not None
        tool = _assembler(chip)
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={arch.group(1)}", str(source), "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    said = done.stderr
    # A kernel may be several functions; what the largest takes is what a thread has.
    registers, spilled = (re.findall(what, said) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    warnings = tuple(line.strip() for line in said.splitlines() if "warning" in line.lower())
    assert registers, said
    return Taken(built.metadata.shared, max(map(int, registers)), max(map(int, spilled), default=0), warnings)


def _assembler(chip: Chip) -> str:
    from triton import knobs

    arch = int(chip.target.arch)
    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    return str(tool.path)
