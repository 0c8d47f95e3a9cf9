"""What the figures were measured on, and where they stand in a page."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def put_table(page: Path, start: str, table: str, end: str) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = page.read_text().split(start)
    page.write_text(before + start + table + "\n" + end + rest.split(end)[1])
