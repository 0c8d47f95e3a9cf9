"""Many sites and many sentences said as few: ``model.layers.{0..29}.mlp.down_proj``, ``the BLAS takes 40..61 us``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

_INDEX = re.compile(r"(?<![^.\[])\d+(?![^.\]])")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?|(?<=x)\d+")
_BRACES = re.compile(r"^(.*)\{([^{}.]*)\}$")
_REPEAT = re.compile(r" #\d+$")


def alike(sentences: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Sites whose sentences differ only in numbers, most sites first, with the numbers as ranges."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for site, sentence in sentences.items():
        template = _NUMBER.sub("\0", sentence)
        groups.setdefault(template, []).append((site, _NUMBER.findall(sentence)))
    said = []
    for template, members in groups.items():
        parts = template.split("\0")
        columns = zip(*(numbers for _, numbers in members), strict=True)
        spans = [_span(column) for column in columns]
        text = parts[0] + "".join(span + part for span, part in zip(spans, parts[1:], strict=True))
        said.append((text, [site for site, _ in members]))
    return sorted(said, key=lambda group: -len(group[1]))


def collapse(paths: Iterable[str]) -> list[str]:
    """Paths with their indices as ranges, and siblings that have the same ranges in one pair of braces."""
    by_template: dict[str, list[tuple[int, ...]]] = {}
    for path in paths:
        indices = tuple(int(n) for n in _INDEX.findall(path))
        by_template.setdefault(_INDEX.sub("\0", path), []).append(indices)
    ranged = [path for template, indices in by_template.items() for path in _ranged(template, indices)]
    siblings: dict[str, list[str]] = {}
    for path in ranged:
        parent, dot, last = path.rpartition(".")
        # A dot inside braces (a range) is not a separator.
        if last.count("}") != last.count("{"):
            parent, dot, last = "", "", path
        siblings.setdefault(parent + dot, []).append(last)
    return [p + (c[0] if len(c) == 1 else "{" + ",".join(_unbraced(c)) + "}") for p, c in siblings.items()]


def expand(site: str) -> list[str]:
    """The module paths of one site: ``attn.{q,k} #2`` is ``attn.q`` and ``attn.k``."""
    plain = _REPEAT.sub("", site)
    braces = _BRACES.match(plain)
    return [braces[1] + name for name in braces[2].split(",")] if braces else [plain]


def layered(path: str) -> tuple[str, str]:
    """Which layer a module is of, and what it is in it: ``layers.3`` and ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj``.

    The model itself, for what is in no layer.
    """
    found = _INDEX.search(path)
    if found is None:
        return "(model)", path
    name = path[: found.start() - 1].rpartition(".")[2]
    return f"{name}.{found[0]}", path[found.end() + 1 :] or "(all)"


def runs(numbers: Sequence[int]) -> list[str]:
    """``["0..3", "5"]`` of [0, 1, 2, 3, 5]."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1].append(n)
        else:
            found.append([n])
    return [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in found]


def _ranged(template: str, indices: Sequence[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(c)) for c in zip(*indices, strict=True)]
    if len(set(indices)) == len(list(product(*columns))):
        return [_filled(template, [_runs(c) for c in columns])]
    # Not every combination occurs: keep the first index apart, and try again with what is left.
    found = []
    for first in columns[0]:
        rest = [i[1:] for i in indices if i[0] == first]
        head, _, tail = template.partition("\0")
        found += _ranged(f"{head}{first}{tail}", rest)
    return found


def _filled(template: str, values: Sequence[str]) -> str:
    parts = template.split("\0")
    return parts[0] + "".join(v + p for v, p in zip(values, parts[1:], strict=True))


def _runs(numbers: Sequence[int]) -> str:
    said = runs(numbers)
    return said[0] if len(numbers) == 1 else "{" + ",".join(said) + "}"


def _span(column: Sequence[str]) -> str:
    numbers = sorted(set(column), key=float)
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"


def _unbraced(names: Sequence[str]) -> list[str]:
    return [name.strip("{}") if _BRACES.match(name) else name for name in names]
