"""A random program is data: lines of Python in a few classes, which can be printed, run, and shrunk line by line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NAMES: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
"""What the text of a program may refer to."""
_TARGETS = re.compile(r"^(\w+(?:, \w+)*) = ")
_WORD = re.compile(r"(?<![\w.])[a-z]\w*")


@dataclass(frozen=True)
class Line:
    """One statement."""

    text: str

    def source(self) -> str:
        return self.text

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that it gives a value to."""
        found = _TARGETS.match(self.text)
        return tuple(found[1].split(", ")) if found else ()

    @property
    def reads(self) -> list[str]:
        """Names that it reads, in order; some are modules or keywords of calls, which no one assigns."""
        return list(dict.fromkeys(_WORD.findall(_TARGETS.sub("", self.text))))


@dataclass(frozen=True)
class Region:
    """Statements under ``with ...:`` or ``if ...:``, and those under the ``else:`` of the latter."""

    head: str
    body: tuple[Statement, ...]
    otherwise: tuple[Statement, ...] = ()

    def source(self) -> str:
        text = f"{self.head}\n{indent(joined(self.body) or 'pass', '    ')}"
        return text + (f"\nelse:\n{indent(joined(self.otherwise), '    ')}" if self.otherwise else "")


Statement = Line | Region


def joined(statements: tuple[Statement, ...] | list[Statement]) -> str:
    return "\n".join(s.source() for s in statements)


def lines(statements: tuple[Statement, ...]) -> Iterator[Line]:
    """Every line, those inside regions too."""
    for s in statements:
        if isinstance(s, Line):
            yield s
        else:
            yield from lines(s.body)
            yield from lines(s.otherwise)


@dataclass(frozen=True)
class Class:
    """A module: what its constructor makes, and its forward."""

    name: str
    setup: tuple[Line, ...]
    inputs: tuple[str, ...]
    body: tuple[Statement, ...]
    returns: str

    def source(self) -> str:
        setup = indent(joined((Line("super().__init__()"), *self.setup)), " " * 8)
        body = indent(joined((*self.body, Line(f"return {self.returns}"))), " " * 8)
        given = ", ".join(("self", *self.inputs))
        return f"class {self.name}(nn.Module):\n    def __init__(self):\n{setup}\n\n    def forward({given}):\n{body}\n"


@dataclass(frozen=True)
class Program:
    """A model, its inputs as expressions in the sizes ``b`` (batch), ``t`` (tokens) and ``s`` (tokens of a context), and
    the sizes of each call."""

    seed: int
    classes: tuple[Class, ...]
    inputs: tuple[tuple[str, str], ...]
    calls: tuple[tuple[int, int, int], ...]
    dynamic: bool | None = None
    around: str = ""
    """A context manager around every call, such as ``torch.autocast("cpu", dtype=torch.bfloat16)``."""

    @property
    def model(self) -> Class:
        return self.classes[-1]

    def source(self) -> str:
        return "\n\n".join(c.source() for c in self.classes)

    def build(self) -> nn.Module:
        """The model with its random weights, in eval mode."""
        scope = dict(NAMES)
        exec(compile(self.source(), f"<program {self.seed}>", "exec"), scope)
        torch.manual_seed(self.seed)
        model = scope[self.model.name]().eval()
        # One that starts as a constant (zero bias, unit gain) would hide a rewrite that drops it.
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() < 2:
                    p.add_(torch.randn_like(p) * 0.2)
        return model

    def given(self, call: int) -> list[Any]:
        """New inputs of one call."""
        torch.manual_seed(self.seed + call)
        b, t, s = self.calls[call]
        return [eval(text, {**NAMES, "b": b, "t": t, "s": s}) for _, text in self.inputs]

    def size(self) -> int:
        """Statements, for telling which of two programs is the smaller."""
        return sum(len(list(lines((*c.setup, *c.body)))) + len(c.returns) / 100 for c in self.classes) + len(self.calls)
