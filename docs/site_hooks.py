"""What mkdocs does besides: pages that may or may not be there get their place, and docstrings' roles become code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
OPTIONAL = {"Start": ["onnx.md"], "Measured": ["composition.md"]}
"""Pages by section of the navigation that are put there if they exist."""
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]*)\)")
_ROLE = re.compile(r":(?:class|func|data|attr|mod|meth|exc):<code>~?([\w.]+)</code>")


def on_config(config: Any) -> Any:
    for section in config.nav:
        for name, pages in section.items():
            pages += [page for page in OPTIONAL.get(name, ()) if (DOCS / page).exists() and page not in pages]
    passes = sorted(p.name for p in (DOCS / "passes").glob("*.md") if p.name != "index.md")
    config.nav.insert(2, {"Passes": [f"passes/{name}" for name in passes]})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository outside docs/ work on GitHub; the site has no such pages, and shows their text alone."""

    def target(found: re.Match[str]) -> str:
        inside = DOCS in ((DOCS / page.file.src_uri).parent / found[2]).resolve().parents
        return found[0] if inside else found[1]

    return _OUTSIDE.sub(target, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`~a.b.C``` of a docstring as code: the reference is read here, in editors and in terminals."""
    return _ROLE.sub(lambda found: f"<code>{found[1]}</code>", html)
