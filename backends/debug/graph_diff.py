"""Two listings side by side as one HTML page, and the index of all that one folder holds. Neither needs a network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from accelpass.backends.debug.templates import environment

_CONTEXT = 4
"""Unchanged lines that are shown around a change."""
_ALIGNED = 40_000
"""Pairs of lines that are compared at most to find which line became which; larger changes are shown as they stand."""
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Row:
    """One line of both sides: its number (from 1; None where a side has no such line) and its text as HTML."""

    kind: str
    left: int | None
    before: Markup
    right: int | None
    after: Markup


@dataclass(frozen=True)
class Hunk:
    """Changed lines that stand together, with the lines around them; ``path``: the module that they are in."""

    path: str
    rows: tuple[Row, ...]


def hunks(before: str, after: str) -> list[Hunk]:
    """What changed, in order; equal parts are left out."""
    a, b = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [Hunk(_path(a, group), tuple(_rows(a, b, group))) for group in matcher.get_grouped_opcodes(_CONTEXT)]


def counted(before: str, after: str) -> tuple[int, int]:
    """Lines that are gone, and lines that are new."""
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    changes = [o for o in matcher.get_opcodes() if o[0] != "equal"]
    return sum(o[2] - o[1] for o in changes), sum(o[4] - o[3] for o in changes)


def diff_page(title: str, about: Sequence[tuple[str, str]], before: str, after: str, sites: dict[str, str]) -> str:
    """The page of one pass.

    Args:
        about: (name, value) pairs that are shown above the code.
        sites: what was done to each site.
    """
    found = hunks(before, after)
    return _render("graph_diff.html.j2", title=title, about=about, hunks=found, sites=sites)


def index_page(runs: Sequence[dict[str, Any]]) -> str:
    """The page over all graphs; ``runs`` are what :mod:`~accelpass.backends.debug.debug_mode` writes for each process."""
    return _render("debug_index.html.j2", runs=runs)


def _render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


def _path(lines: Sequence[str], group: Sequence[tuple[str, int, int, int, int]]) -> str:
    """The module under whose comment the first changed line stands."""
    first = next(o[1] for o in group if o[0] != "equal")
    for line in reversed(lines[: first + 1]):
        if re.fullmatch(r" {4}# [\w.{},]+", line):
            return line.strip()[2:]
    return "inputs"


def _rows(a: Sequence[str], b: Sequence[str], group: Sequence[tuple[str, int, int, int, int]]) -> Iterator[Row]:
    for tag, i1, i2, j1, j2 in group:
        if tag == "equal":
            for offset in range(i2 - i1):
                text = Markup(escape(a[i1 + offset]))
                yield Row("same", i1 + offset + 1, text, j1 + offset + 1, text)
            continue
        for i, j in _aligned(a, b, range(i1, i2), range(j1, j2)):
            if i is None and j is not None:
                yield Row("new", None, Markup(""), j + 1, Markup(escape(b[j])))
            elif j is None and i is not None:
                yield Row("gone", i + 1, Markup(escape(a[i])), None, Markup(""))
            elif i is not None and j is not None:
                left, right = _words(a[i], b[j])
                yield Row("changed", i + 1, left, j + 1, right)


def _aligned(
    a: Sequence[str], b: Sequence[str], left: range, right: range
) -> Iterator[tuple[int, None] | tuple[None, int] | tuple[int, int]]:
    """Pairs of lines of which one became the other, in order, and the lines without a partner."""
    pairs: list[tuple[int, int]] = []
    if 0 < len(left) * len(right) <= _ALIGNED:
        words = {line: set(re.findall(r"\w+", line)) for line in (*(a[i] for i in left), *(b[j] for j in right))}
        best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for x in reversed(range(len(left))):
            for y in reversed(range(len(right))):
                alike = _alike(words[a[left[x]]], words[b[right[y]]])
                best[x][y] = max(best[x + 1][y], best[x][y + 1], alike + best[x + 1][y + 1])
        x = y = 0
        while x < len(left) and y < len(right):
            alike = _alike(words[a[left[x]]], words[b[right[y]]])
            if alike and best[x][y] == alike + best[x + 1][y + 1]:
                pairs.append((left[x], right[y]))
                x, y = x + 1, y + 1
            elif best[x][y] == best[x + 1][y]:
                x += 1
            else:
                y += 1
    i, j = left.start, right.start
    for x, y in [*pairs, (left.stop, right.stop)]:
        yield from ((n, None) for n in range(i, x))
        yield from ((None, n) for n in range(j, y))
        if x < left.stop:
            yield x, y
        i, j = x + 1, y + 1


def _alike(a: set[str], b: set[str]) -> float:
    """Shared words of all; 0 for lines that have too little in common to be one line that changed."""
    share = len(a & b) / len(a | b) if a | b else 0.0
    return share if share >= 0.3 else 0.0


def _words(a: str, b: str) -> tuple[Markup, Markup]:
    """Both lines with the words that differ marked."""
    x, y = _WORD.findall(a), _WORD.findall(b)
    left = right = Markup("")
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, x, y, autojunk=False).get_opcodes():
        one, other = "".join(x[i1:i2]), "".join(y[j1:j2])
        mark = Markup("{}") if tag == "equal" else Markup("<mark>{}</mark>")
        left += (mark if one.strip() else Markup("{}")).format(one)
        right += (mark if other.strip() else Markup("{}")).format(other)
    return left, right
