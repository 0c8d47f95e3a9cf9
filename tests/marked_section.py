"""Sections of a page that a program writes: each between two comments, the rest of the page is left alone."""

from __future__ import annotations

import re
from pathlib import Path


def replace_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of section ``name``, at the end of the page where there are none yet."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    section = f"{start}\n\n{text.strip()}\n\n{end}"
    held = page.read_text() if page.exists() else ""
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    made = pattern.sub(lambda _: section, held) if pattern.search(held) else f"{held.rstrip()}\n\n{section}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(made.lstrip("\n"))
