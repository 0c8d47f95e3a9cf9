"""Writes a program line by line and runs each line at once, so that the next can be chosen by real shapes and dtypes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.program import NAMES, Class, Line, Region, Statement

DTYPES = {torch.float32: "torch.float32", torch.bfloat16: "torch.bfloat16", torch.float64: "torch.float64"}
Test = Callable[[Tensor], bool]
_MADE = re.compile(r'^self\.(\w+) = |register_buffer\("(\w+)"')


class Impossible(Exception):
    """A form does not fit the values that there are, or eager torch refuses it; nothing of it is kept."""


def is_feature(size: int) -> bool:
    """Whether a size is that of features: those are multiples of four, and batches and lengths are not."""
    return size > 0 and size % 4 == 0


class Writer:
    """One class in the making.

    Attributes:
        values: what each local name is, at the sizes of the first call.
        without: parts of the grammar that are switched off.
        scope: classes written before, by name.
    """

    def __init__(
        self,
        rng: random.Random,
        values: dict[str, Any],
        without: frozenset[str] = frozenset(),
        scope: dict[str, Any] | None = None,
    ) -> None:
        self.rng, self.values, self.without, self.scope = rng, dict(values), without, scope or {}
        self.inputs = tuple(values)
        self.owner: Any = nn.Module()
        self.owner.eval()
        self.setup: list[Line] = []
        self.body: list[Statement] = []
        self.count = 0

    # What is there.

    def pick(self, test: Test, recent: float = 0.6) -> str:
        """A tensor that passes ``test``; most often a late one."""
        found = [n for n, v in self.values.items() if isinstance(v, Tensor) and test(v)]
        if not found:
            raise Impossible("no such value")
        return found[-1] if self.rng.random() < recent else self.rng.choice(found)

    def hidden(self) -> str:
        """A float tensor whose last axis is of features."""
        return self.pick(lambda v: v.is_floating_point() and v.dim() >= 2 and is_feature(v.shape[-1]))

    def stream(self) -> str:
        """(batch, tokens, features)."""
        return self.pick(lambda v: v.is_floating_point() and v.dim() == 3 and is_feature(v.shape[-1]), 0.8)

    def like(self, name: str) -> str:
        """A value of the same shape as ``name``."""
        return self.pick(lambda v: v.is_floating_point() and v.shape == self.values[name].shape, 0.2)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def one_of(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def maybe(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    # What is written.

    def let(self, text: str) -> str:
        """``v3 = text``; returns the name."""
        self.count += 1
        name = f"v{self.count}"
        self.do(f"{name} = {text}")
        return name

    def do(self, text: str) -> None:
        line = Line(text)
        self._run(line.source())
        self.body.append(line)

    def region(self, head: str, body: list[Statement], otherwise: list[Statement]) -> None:
        made = Region(head, tuple(body), tuple(otherwise))
        self._run(made.source())
        self.body.append(made)

    @contextmanager
    def under(self, head: str) -> Iterator[None]:
        """What is written inside goes under ``with head:``."""
        outer, self.body = self.body, []
        try:
            with eval(head, NAMES):
                yield
        finally:
            inner, self.body = self.body, outer
        if inner:
            self.body.append(Region(f"with {head}:", tuple(inner)))

    def attribute(self, text: str, kind: str = "a") -> str:
        """``self.a1 = text`` in the constructor; returns ``self.a1``."""
        self.count += 1
        name = f"{kind}{self.count}"
        line = f'self.register_buffer("{name}", {text})' if kind == "buffer" else f"self.{name} = {text}"
        self.construct(line)
        return f"self.{name}"

    def construct(self, text: str) -> None:
        self._run(text)
        self.setup.append(Line(text))

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """A parameter."""
        size = ", ".join(map(str, shape))
        return self.attribute(f"nn.Parameter(torch.randn({size}{self.dtype_argument(dtype)}) * 0.3)", "w")

    def dtype_argument(self, dtype: torch.dtype) -> str:
        return "" if dtype == torch.float32 else f", dtype={DTYPES[dtype]}"

    def dim(self, name: str, axis: int) -> str:
        """The size of an axis as a program writes it."""
        return self.one_of(f"{name}.shape[{axis}]", f"{name}.shape[{axis}]", f"{name}.size({axis})")

    def _run(self, source: str) -> None:
        scope = {**NAMES, **self.scope, "self": self.owner}
        try:
            with torch.no_grad():
                exec(source, scope, self.values)
        except Exception as refused:  # whatever eager torch says to a random line
            raise Impossible(str(refused)) from refused

    def attempt(self, form: Callable[[Writer], Any]) -> bool:
        """Write a form, or nothing of it where it is impossible."""
        setup, body, values = len(self.setup), len(self.body), dict(self.values)
        try:
            form(self)
        except Impossible:
            for line in self.setup[setup:]:
                if made := _MADE.search(line.text):
                    delattr(self.owner, made[1] or made[2])
            del self.setup[setup:], self.body[body:]
            self.values = values
            return False
        return True

    def finish(self, name: str, returns: str) -> Class:
        return Class(name, tuple(self.setup), self.inputs, tuple(self.body), returns)
