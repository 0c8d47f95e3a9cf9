"""The samples with which torch tests its own operators and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tests.peers.case import Row, Sample, add, judge

SAMPLES = 6
INDUCTOR = 40  # every so many operators one goes through Inductor as well
_UNSET = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
"""Operators that return memory as they find it."""
_KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


@cache
def databases() -> tuple[list[Any], list[Any]]:
    """torch's operators and modules with their samples."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return list(op_db), list(module_db)


def _shaped(op: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose values nobody promises, with zeros in their place."""
    return lambda *args, **kwargs: torch.zeros_like(op(*args, **kwargs))


def _called(op: Any) -> Callable[..., Any]:
    """What a user calls, where the database has a function of torch.testing around it (to seed it), which Dynamo does not enter."""
    found: Any = op.op
    if str(getattr(found, "__module__", "")).startswith("torch.testing"):
        found = torch
        for part in op.name.split("."):
            found = getattr(found, part, None)
    return found if callable(found) else op.op


class Operator(nn.Module):
    """Calls an operator. What it is given beside its first argument may be the module's own parameters, as a linear's weight."""

    def __init__(self, op: Callable[..., Any], held: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.op = op
        self.held = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in held])

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return self.op(given, *self.held, *args, **kwargs)


def operator_row(op: Any, samples: int, inductor: bool) -> Callable[[Row], None]:
    called = _shaped(op.op) if op.name in _UNSET else _called(op)

    def body(row: Row) -> None:
        for name, dtype in _KINDS.items():
            if not op.supports_dtype(dtype, "cpu"):
                continue
            for number, s in enumerate(_taken(op.sample_inputs("cpu", dtype, requires_grad=False), samples)):
                weights = tuple(a for a in s.args if isinstance(a, Tensor)) if dtype != torch.int64 else ()
                # Every second sample has its further tensors as parameters; every third is compiled for any size.
                mine = number % 2 == 1 and weights and len(weights) == len(s.args) and all(map(_is_float, weights))
                model = Operator(called, weights if mine else ()).eval()
                sample = Sample(op.name, model, (s.input, *(() if mine else s.args)), s.kwargs)
                found = judge(sample, number % 3 == 2, inductor and number == 0 and name == "float32")
                add(row, f"{name} sample {number}", found)

    return body


def _is_float(t: Tensor) -> bool:
    return t.is_floating_point() and t.layout == torch.strided


def _taken(samples: Any, count: int) -> Iterator[Any]:
    return islice(iter(samples), count)


def module_row(info: Any, samples: int, inductor: bool) -> Callable[[Row], None]:
    def body(row: Row) -> None:
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            given = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=False)
            for number, each in enumerate(_taken(given, samples)):
                made, forward = each.constructor_input, each.forward_input
                if forward is None:
                    continue
                torch.manual_seed(0)
                try:
                    model = info.module_cls(*made.args, **made.kwargs, device="cpu", dtype=dtype).eval()
                except TypeError:  # one without tensors of its own takes neither
                    model = info.module_cls(*made.args, **made.kwargs).eval()
                sample = Sample(info.name, model, tuple(forward.args), forward.kwargs)
                add(row, f"{name} sample {number}", judge(sample, number % 3 == 2, inductor and number == 0))

    return body


def key_of(op: Any) -> str:
    return f"operator/{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}"


def rows(samples: int) -> dict[str, Callable[[Row], None]]:
    """What is measured, by key."""
    ops, modules = databases()
    found = {key_of(op): operator_row(op, samples, i % INDUCTOR == 0) for i, op in enumerate(ops)}
    return found | {f"module/{m.name}": module_row(m, samples, i % INDUCTOR == 0) for i, m in enumerate(modules)}
