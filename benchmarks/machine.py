"""What the figures were measured on, and where they stand in a page."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accelpass.ir.torch_private import cpu_multiplies_bfloat16, cpu_multiplies_int8


def cpu() -> str:
    """The processor's name, with family and model where Linux tells them: a virtual machine's name may be a make's alone."""
    info = Path("/proc/cpuinfo")
    said = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", info.read_text(), re.MULTILINE)) if info.is_file() else {}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    which = [f"{key.split()[-1]} {said[key]}" for key in ("cpu family", "model") if key in said]
    return f"{said['model name']} ({', '.join(which)})" if which else said["model name"]


def features() -> str:
    """What products this processor has instructions for: ``AVX2, no VNNI (products of int8), no bfloat16 products``."""
    has = {"VNNI (products of int8)": cpu_multiplies_int8(), "bfloat16 products": cpu_multiplies_bfloat16()}
    return ", ".join(
        [torch.backends.cpu.get_cpu_capability(), *(n if known else f"no {n}" for n, known in has.items())]
    )


def goes_on(before: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run whose rows do not depend on the processor: all that measured some are named. Empty if ``before`` differs.

    Args:
        before: what is in the file.
    """
    if not before.items() >= {k: v for k, v in settings.items() if k != "cpu"}.items():
        return {}
    held = str(before.get("cpu", "")).split("; ")
    return {**settings, "cpu": "; ".join(dict.fromkeys([*filter(None, held), settings["cpu"]]))}


def row_lines(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a table of Markdown, their ``name`` first; an empty line behind it."""
    names = [name for name in rows[0] if name != "name"]
    return [
        f"| {title} | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {row['name']} | {' | '.join(str(row[name]) for name in names)} |" for row in rows),
        "",
    ]


def put_table(page: Path, start: str, table: str, end: str) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = page.read_text().split(start)
    page.write_text(before + start + table + "\n" + end + rest.split(end)[1])
