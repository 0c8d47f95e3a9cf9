"""Draws a program: inputs, a few forms one after the other, what is returned, and the calls that are made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.fuzz import forms
from tests.fuzz.attention import attention
from tests.fuzz.program import NAMES, Class, Program
from tests.fuzz.writer import Impossible, Writer

FEATURES = ("autocast", "aliases", "empty")
"""Parts of the grammar that can be switched off by name."""
_FORMS: tuple[tuple[float, Callable[[Writer], Any]], ...] = (
    (5, attention), (4, forms.linear), (2.5, forms.norm), (2, forms.mlp), (2, forms.residual), (1.5, forms.activation), (2, forms.view),
    (1.2, forms.cast), (1.2, forms.write), (1, forms.combine), (0.8, forms.condition), (0.8, forms.indices), (0.5, forms.made_inside),
)  # fmt: skip
_CONTEXTS = (
    'torch.autocast("cpu", dtype=torch.bfloat16)',
    'torch.autocast("cpu", enabled=False)',
    "torch.no_grad()",
    "torch.inference_mode()",
)
_SIZES = ((2, 5, 3), (1, 7, 5), (3, 1, 2), (2, 6, 7), (1, 1, 1), (3, 5, 5), (0, 5, 3))


def program(seed: int, without: frozenset[str] = frozenset()) -> Program:
    """The program of a number, always the same one."""
    rng = random.Random(seed)
    sizes = [s for s in _SIZES if s[0] or "empty" not in without]
    calls = [rng.choice([s for s in sizes if s[0]]) if rng.random() < 0.95 else rng.choice(sizes)]
    if rng.random() < 0.25:
        calls.append(rng.choice(sizes) if rng.random() < 0.3 else rng.choice(sizes[:-1]))
    inputs = _inputs(rng)
    made = Program(seed, (), tuple(inputs.items()), tuple(calls), rng.choice((None, None, False, True)))
    values = dict(zip(inputs, made.given(0), strict=True))
    classes: list[Class] = []
    scope: dict[str, Any] = {}
    w = Writer(rng, values, without)
    if rng.random() < 0.2:
        _blocks(w, classes, scope)
    for _ in range(rng.randint(1, 5)):
        _form(w)
    classes.append(w.finish("Model", _returned(w)))
    around = _CONTEXTS[0] if "autocast" not in without and rng.random() < 0.04 else ""
    return Program(seed, tuple(classes), made.inputs, made.calls, made.dynamic, around)


def _inputs(rng: random.Random) -> dict[str, str]:
    """Inputs by name; what a program does not read is an unused one."""
    dtype = rng.choice(("", "", "", "", ", dtype=torch.bfloat16", ", dtype=torch.float64"))
    width = rng.choice(forms.WIDTHS)
    given = {"x": f"torch.randn(b, t, {width}{dtype})"}
    more = {
        "context": f"torch.randn(b, s, {rng.choice((width, 16))}{dtype})",
        "ids": "torch.randint(0, 12, (b, t))",
        "seen": "torch.arange(t).expand(b, t) < torch.arange(1, b + 1)[:, None] + 1",
        "mask": "torch.rand(b, 1, t, t) > 0.3",
        "gain": f"torch.randn({width})",
        "y": f"torch.randn(b, t, {width})",
    }
    for name, text in more.items():
        if rng.random() < 0.3:
            given[name] = text
    if rng.random() < 0.1:
        given["flag"] = rng.choice(("None", "True", "0.5", "3"))
    return given


def _form(w: Writer) -> None:
    """One form that fits; in a context of its own now and then."""
    weights, functions = zip(*_FORMS, strict=True)
    for _ in range(20):
        chosen = w.rng.choices(functions, weights)[0]
        inside = _CONTEXTS[w.rng.choice((0, 0, 0, 1, 2, 3))] if w.maybe(0.06) else ""
        if inside and not ("autocast" in w.without and "autocast" in inside):

            def form(w: Writer, chosen: Any = chosen, inside: str = inside) -> None:
                with w.under(inside):
                    chosen(w)
                    if w.maybe(0.5):
                        w.rng.choices(functions, weights)[0](w)

            chosen = form
        if w.attempt(chosen):
            return


def _blocks(w: Writer, classes: list[Class], scope: dict[str, Any]) -> None:
    """A class of blocks, equal in shape, one after the other; one of them may come twice."""

    def stack(w: Writer) -> None:
        x = w.stream()
        inner = Writer(w.rng, {"x": w[x].clone()}, w.without)
        for _ in range(w.rng.randint(1, 2)):
            _form(inner)
        same = [
            n
            for n, v in inner.values.items()
            if isinstance(v, Tensor) and v.shape == w[x].shape and v.dtype == w[x].dtype
        ]
        if not same:
            raise Impossible("no block of this shape")
        block = inner.finish("Block", same[-1])
        exec(block.source(), names := dict(NAMES))
        w.scope["Block"] = names["Block"]
        layers = w.attribute(f"nn.ModuleList([Block() for _ in range({w.rng.randint(2, 3)})])")
        h = x
        for number in w.rng.choice(((0, 1), (0, 1), (1, 0, 1))):
            h = w.let(f"{layers}[{number}]({h})")
        classes.append(block)

    before = len(classes)
    if not w.attempt(stack):
        del classes[before:]


def _returned(w: Writer) -> str:
    """The expression of what is returned: a value, several, a dict, an input among them, a view of one."""
    tensors = [n for n, v in w.values.items() if isinstance(v, Tensor) and n not in w.inputs]
    last = tensors[-1] if tensors else "x"
    more = w.rng.sample(tensors, min(len(tensors), w.rng.randint(1, 2))) or [last]
    way = w.rng.randrange(12)
    if way < 5:
        return last
    if way < 7:
        return f"({', '.join((last, *more))})"
    if way == 7:
        return f'{{"last": {last}, "more": [{", ".join(more)}]}}'
    if way == 8:
        return f"({last}, {w.rng.choice(w.inputs)}, None)"
    if way == 9:
        return f"({last}, {last}.shape[0], {more[0]})"
    if way == 10 and "aliases" not in w.without:
        return f"({last}, {more[0]}[...], x.detach(), {more[0]}.view({more[0]}.shape))"
    return f"({last}.sum(), {', '.join(more)})"
