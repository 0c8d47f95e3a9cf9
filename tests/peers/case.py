"""One peer's sample: a callable with its arguments, compiled and compared with eager."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from accelpass.testing.trial import cause, told
from tests.fuzz.judge import TOLERANCES, Switch, rounded

DEFAULT = {"lowering": "aten"}
ROUNDED = {"lowering": "eager", "passes": ["int8_weights"]}
INDUCTOR = {"lowering": "inductor"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What is compiled and what it is given; both are copied for each run."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def cloned(tree: Any) -> Any:
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else copy.copy(v), tree)


def answer(sample: Sample, called: Callable[..., Any]) -> Any:
    """Outputs and what became of the arguments, or the error."""
    args, kwargs = cloned(sample.args), cloned(sample.kwargs)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            made = called(*args, **kwargs)
        return cloned((made, args, kwargs))
    except Exception as error:  # compared by whether the other raised, too
        return error


def differs(want: Any, got: Any, tolerance: float | None = None) -> str:
    """What differs between two answers; an empty string if nothing does."""
    if isinstance(want, Exception) or isinstance(got, Exception):
        both = isinstance(want, Exception) and isinstance(got, Exception)
        shown = [told(cause(a))[:160] if isinstance(a, Exception) else "answers" for a in (want, got)]
        return "" if both else f"eager {shown[0]}, compiled {shown[1]}"
    one, spec = tree_flatten(want)
    two, other = tree_flatten(got)
    if spec != other:
        return f"built otherwise: {spec} and {other}"[:200]
    for a, b in zip(one, two, strict=True):
        if found := _leaf(a, b, tolerance):
            return found
    return ""


def _leaf(a: Any, b: Any, tolerance: float | None) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        same = type(a) is type(b) and (a == b or a != a) if isinstance(a, int | float | str | bool) else True
        return "" if same else f"{a!r} and {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    if a.layout != torch.strided or not a.numel() or a.is_quantized:
        return ""
    if not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else "other integers"
    limit = max(tolerance or 0.0, TOLERANCES.get(a.dtype, 2e-5))
    x, y = (torch.view_as_real(v.resolve_conj()).double() if v.is_complex() else v.double() for v in (a, b))
    if not torch.equal(x.isnan(), y.isnan()):
        return "NaN at other places"
    x, y = (v.nan_to_num(0.0, 1e30, -1e30) for v in (x, y))
    error = float((x - y).abs().max() / x.abs().max().clamp_min(1e-6))
    return f"differs by {error:.1e}" if error > limit else ""


def judge(sample: Sample, dynamic: bool | None, inductor: bool = False) -> dict[str, str]:
    """By name of the options: an empty string where they agree with eager, ``-`` where plain torch.compile does not either,
    ``eager`` where Dynamo gave the backend no graph, or what differs. Empty where eager itself refuses the sample."""
    want = answer(sample, sample.model)
    if isinstance(want, Exception):
        return {}
    every = [DEFAULT, ROUNDED]
    switch = Switch(every)
    torch._dynamo.reset()
    fast = torch.compile(sample.model, backend=switch, dynamic=dynamic)
    found: dict[str, str] = {}
    for number, name in enumerate(("default", "int8_weights")):
        switch.chosen = number
        got, right = answer(sample, fast), want
        if number == 1 and list(sample.model.parameters()):
            right = answer(sample, rounded(sample.model))
        found[name] = differs(right, got)
    if not switch.graphs:
        found = {name: text or "eager" for name, text in found.items()}
    if inductor:
        torch._dynamo.reset()
        fast = torch.compile(sample.model, backend="accelpass", options=INDUCTOR, dynamic=dynamic)
        found["inductor"] = differs(want, answer(sample, fast))
    if any(text not in ("", "eager") for text in found.values()):
        torch._dynamo.reset()
        plain = answer(sample, torch.compile(sample.model, backend="aot_eager", dynamic=dynamic))
        if differs(want, plain):
            found = {name: "-" if text not in ("", "eager") else text for name, text in found.items()}
        elif found.get("inductor"):
            torch._dynamo.reset()
            plain = answer(sample, torch.compile(sample.model, backend="inductor", dynamic=dynamic))
            found["inductor"] = "-" if differs(want, plain) else found["inductor"]
    return found


def add(row: Row, label: str, found: dict[str, str]) -> None:
    """Count a sample's verdicts."""
    if not found:
        row["unusable"] = row.get("unusable", 0) + 1
    for name, text in found.items():
        kind = {"": "same", "-": "incomparable", "eager": "uncompiled"}.get(text, "wrong")
        row[kind] = row.get(kind, 0) + 1
        if kind == "wrong":
            row.setdefault("why", []).append(f"{label}, {name}: {text}")


def isolated(key: str, body: Callable[[Row], None], limit: int) -> Row:
    """Run in a forked child: one that crashes or hangs is a row that says so."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(limit)
        row: Row = {"key": key}
        try:
            body(row)
        except BaseException as error:  # whatever it is, the parent reports it
            row["failed"] = told(error)[:200] if isinstance(error, Exception) else repr(error)
        with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(row))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"key": key, "failed": f"no answer within {limit} s, or a crash"}
