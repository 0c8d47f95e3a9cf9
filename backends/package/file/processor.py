"""What code compiled on one machine needs of another: its architecture, and instructions that a compiler chooses by itself."""

from __future__ import annotations

import platform
from pathlib import Path

_CHOSEN = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "amx", "popcnt", "abm", "movbe", "gfni")
_BY_HAND = frozenset({"sse4a"})  # of AMD alone, and no compiler takes it unless it is told to


def machine() -> str:
    """The operating system and architecture: ``Linux x86_64``."""
    return f"{platform.system()} {platform.machine()}"


def instructions(about: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Names of the instruction sets of this processor, sorted; empty where the system does not tell."""
    try:
        lines = about.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, found = line.partition(":")
        if name.strip() == "flags":
            return sorted({f for f in found.split() if f.startswith(_CHOSEN)} - _BY_HAND)
        if name.strip() == "Features":  # ARM
            return sorted(set(found.split()))
    return []
