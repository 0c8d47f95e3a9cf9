"""Runs a program eagerly and compiled, and says whether both did the same: outputs, written inputs and buffers, errors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from accelpass.backends import backend, graphs_of
from accelpass.testing.trial import cause, is_refusal, told
from tests.fuzz.program import NAMES, Program
from tests.fuzz.settings import Options, rounds
from tests.packing import pack_int8

Status = Literal["same", "refused", "incomparable", "wrong"]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Of the largest value: some forty roundings of the least precise dtype that a program computes in."""


@dataclass(frozen=True)
class Verdict:
    """What came of one compilation: ``incomparable`` where plain torch.compile, none of our code in it, differs from eager, too."""

    status: Status
    why: str = ""
    sites: int = 0


@dataclass(frozen=True)
class Ran:
    """All that a run of a program's calls can be seen to have done."""

    answers: tuple[Any, ...]
    """Of each call its outputs, or the error."""
    inputs: tuple[Any, ...]
    """As each call left them."""
    state: tuple[Any, ...]
    """Parameters and buffers, as the calls left them."""


def run(program: Program, called: Callable[..., Any], model: nn.Module, noise: float = 0.0) -> Ran:
    """Call with new inputs, one call after the other.

    Args:
        noise: relative change of the inputs, to see how much that alone changes.
    """
    answers: list[Any] = []
    inputs: list[Any] = []
    for number in range(len(program.calls)):
        given = program.given(number)
        if noise:
            given = [v * (1 + noise * torch.randn_like(v)) if _is_float(v) else v for v in given]
        around: AbstractContextManager[Any] = eval(program.around, NAMES) if program.around else nullcontext()
        torch.manual_seed(0)
        try:
            with torch.no_grad(), around:
                made = called(*given)
            answers.append(tree_map(lambda v, given=tuple(given): _kept(v, given), made))
        except Exception as error:  # both may raise: told apart when they are compared
            answers.append(error)
        inputs.append([_kept(v, ()) for v in given])
    return Ran(tuple(answers), tuple(inputs), tuple(_kept(t, ()) for t in (*model.parameters(), *model.buffers())))


@dataclass(frozen=True)
class Kept:
    """A copy of a tensor; with the number of the input that it is, or -1."""

    value: Tensor
    is_input: int


def _kept(v: Any, given: Sequence[Any]) -> Any:
    if not isinstance(v, Tensor):
        return v
    return Kept(v.detach().clone(), next((i for i, g in enumerate(given) if g is v), -1))


def _is_float(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def difference(want: Ran, got: Ran, tolerance: float) -> str:
    """The first thing that differs, or an empty string."""
    for call, (a, b) in enumerate(zip(want.answers, got.answers, strict=True)):
        if isinstance(a, Exception) or isinstance(b, Exception):
            if not (isinstance(a, Exception) and isinstance(b, Exception)):
                return f"call {call}: eager {_told(a)}, compiled {_told(b)}"
            return ""  # what later calls and buffers are after an error is nobody's promise
        if differs := _trees_differ(a, b, tolerance):
            return f"call {call}: output {differs}"
    for call, (a, b) in enumerate(zip(want.inputs, got.inputs, strict=True)):
        if differs := _trees_differ(a, b, tolerance):
            return f"call {call}: input {differs}"
    if differs := _trees_differ(list(want.state), list(got.state), tolerance):
        return f"state {differs}"
    return ""


def _told(answer: Any) -> str:
    return f"raises {told(cause(answer))[:300]}" if isinstance(answer, Exception) else "answers"


def _trees_differ(want: Any, got: Any, tolerance: float) -> str:
    one, spec = tree_flatten(want)
    two, other = tree_flatten(got)
    if spec != other:
        return f"is built otherwise: {spec} and {other}"
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        if differs := _leaves_differ(a, b, tolerance):
            return f"{number}: {differs}"
    return ""


def _leaves_differ(a: Any, b: Any, tolerance: float) -> str:
    if not (isinstance(a, Kept) and isinstance(b, Kept)):
        return "" if type(a) is type(b) and a == b else f"{a!r} and {b!r}"
    x, y = a.value, b.value
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
    if a.is_input != b.is_input:
        return f"is input {a.is_input} and {b.is_input}"
    if not x.numel():
        return ""
    x, y = x.double(), y.double()
    if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x.isinf(), y.isinf()):
        return "NaN or infinity at other places"
    x, y = (v.nan_to_num(0.0, 0.0, 0.0) for v in (x, y))
    error = float((x - y).abs().max() / x.abs().max().clamp_min(1e-6))
    return f"differs by {error:.1e} of its largest value" if error > tolerance else ""


class Switch:
    """A backend that compiles each of Dynamo's graphs with several options, and runs the one that is chosen: Dynamo traces once."""

    def __init__(self, options: Sequence[Options]) -> None:
        self.options, self.chosen, self.graphs = options, 0, 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        made: list[Any] = []
        for options in self.options:
            try:
                made.append(backend(gm, inputs, options=options))
            except Exception as error:  # raised again by whoever chooses these options
                made.append(error)

        def chosen(*args: Any) -> Any:
            fn = made[self.chosen]
            if isinstance(fn, Exception):
                raise fn
            return fn(*args)

        return chosen


def tolerance_of(program: Program) -> float:
    """By the least precise dtype that the program names, or that autocast computes in."""
    text = program.source() + str(program.inputs) + program.around
    if "bfloat16" in text:
        return TOLERANCES[torch.bfloat16]
    if (
        "float64" in str(program.inputs)
        and "float32" not in text
        and "float()" not in text
        and "randn" not in text.replace("dtype=torch.float64", "")
    ):
        return TOLERANCES[torch.float64]
    return TOLERANCES[torch.float32]


def judge(program: Program, options: Sequence[Options], confirm: bool = True) -> list[Verdict]:
    """A verdict for each of ``options``; several share one trace of Dynamo.

    Args:
        confirm: make sure of what looks wrong, that plain torch.compile and roundings of the inputs do not do the same.
    """
    torch._dynamo.reset()
    model = program.build()
    start = copy.deepcopy(model.state_dict())
    want = run(program, model, model)
    model.load_state_dict(start)
    switch = Switch(options)
    many = len(options) > 1
    fast = (
        torch.compile(model, backend=switch, dynamic=program.dynamic) if many else compiled(program, model, options[0])
    )
    verdicts = []
    for number, each in enumerate(options):
        switch.chosen = number
        model.load_state_dict(start)
        got = run(program, fast, model)
        verdicts.append(_verdict(program, model, start, want, got, each, confirm))
    return verdicts


def compiled(program: Program, model: nn.Module, options: Options) -> Any:
    """As a user compiles it."""
    return torch.compile(model, backend="accelpass", options=options, dynamic=program.dynamic)


def _verdict(
    program: Program, model: nn.Module, start: Any, want: Ran, got: Ran, options: Options, confirm: bool
) -> Verdict:
    refusal = next((cause(a) for a in got.answers if isinstance(a, Exception) and is_refusal(cause(a))), None)
    if refusal is not None and options.get("passes"):
        return Verdict("refused", told(refusal)[:200])
    sites = sum(len(r.took) for g in graphs_of(model) for r in g.report.records)
    limit, dense = tolerance_of(program), want
    if rounds(options):
        # Lowered, products of many rows are of bfloat16 where the processor multiplies it.
        limit = max(limit, TOLERANCES[torch.bfloat16] if options["lowering"] != "eager" else 0.0)
        model.load_state_dict(start)
        want = run(program, *[rounded(model)] * 2)
        got = Ran(got.answers, got.inputs, want.state)
    if not (why := difference(want, got, limit)):
        return Verdict("same", sites=sites)
    if not confirm:
        return Verdict("wrong", why, sites)
    if "differs by" in why and _explained(program, model, start, want, got, limit):
        return Verdict("same", sites=sites)
    if any(difference(dense, plain, limit) for plain in _plain(program, options)):
        return Verdict("incomparable", why)
    return Verdict("wrong", why, sites)


def _explained(program: Program, model: nn.Module, start: Any, want: Ran, got: Ran, limit: float) -> bool:
    """Whether a rounding of the inputs alone makes a tenth of the difference: a badly conditioned program, no fault of a compiler."""
    model.load_state_dict(start)
    twin = copy.deepcopy(model)
    shaken, quiet = (run(program, twin, twin, noise) for noise in (limit / 10, 0.0))
    allowed = limit
    while difference(quiet, shaken, allowed) and allowed < 1:
        allowed *= 2
    return not difference(want, got, 10 * allowed)


def _plain(program: Program, options: Options) -> Iterator[Ran]:
    """What plain torch.compile makes of the program: with Inductor where it was asked for, else Dynamo alone, and its graph as ATen."""
    for name in ("inductor",) if options.get("lowering") == "inductor" else ("eager", "aot_eager"):
        torch._dynamo.reset()
        model = program.build()
        yield run(program, torch.compile(model, backend=name, dynamic=program.dynamic), model)
    torch._dynamo.reset()


def rounded(model: nn.Module) -> nn.Module:
    """A copy with the weights that ``int8_weights`` packed for the compiled graphs rounded as it rounds them."""
    twin = copy.deepcopy(model)
    its = dict(zip(map(id, _held(model)), _held(twin), strict=True))
    done: set[int] = set()
    for graph in graphs_of(model):
        for group in () if graph.binder is None else graph.binder.groups:
            for position, transposed in _packed(group.recipe.key, group.positions):
                for weight in graph.models.read_at([position]):  # of each part of the model that ran the graph
                    if id(weight) in its and id(weight) not in done:
                        done.add(id(weight))
                        with torch.no_grad():
                            its[id(weight)].copy_(_rounded(its[id(weight)], transposed))
    return twin


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _packed(key: tuple[Any, ...], positions: Sequence[int]) -> list[tuple[int, bool]]:
    """Which sources of a derivation are packed as int8, and whether each is transposed first."""
    if key[0] == "int8":
        return [(p, key[2]) for p in positions]
    if not isinstance(key[0], tuple):
        return []
    # One derivation of several others, such as packed weights put together: each with the span of its sources.
    return [p for inner, _, start, end in key[1:] if inner for p in _packed(inner, positions[start:end])]


def _rounded(weight: Tensor, transposed: bool) -> Tensor:
    q, scale = pack_int8(weight.transpose(-1, -2) if transposed else weight)
    made = q.float() * scale.unsqueeze(-1)
    return (made.transpose(-1, -2) if transposed else made).to(weight.dtype)


def collect() -> None:
    """Free what earlier programs left in reference cycles; what is left, most of it modules, is never looked at again."""
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    gc.disable()
