"""A failing program as a file of its own, which prints PASS where the compiled model does what the eager one does, else FAIL."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.judge import Verdict, tolerance_of
from tests.fuzz.program import Program
from tests.fuzz.settings import Options, rounds

FOLDER = Path(__file__).parent / "found"
_TEMPLATE = '''"""{title}

Made by ``make fuzz`` from program {seed}, and shrunk.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401
from torch.utils._pytree import tree_flatten

{classes}

OPTIONS = {options}
CALLS = {calls}  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed({seed} + call)
    return [{inputs}]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed({seed})
    model, made = Model().eval(), []
    fast = torch.compile(model, backend="accelpass", options=OPTIONS, dynamic={dynamic}) if compile_it else model
    for call, sizes in enumerate(CALLS):
        given = inputs(call, *sizes)
        with torch.no_grad(), {around}:
            try:
                answer = fast(*given)
            except Exception as error:
                made.append("raised")
                print(f"compiled {{compile_it}}: {{type(error).__name__}}: {{str(error)[:200]}}")
                break
        leaves, spec = tree_flatten(answer)
        made += [str(spec), *(next((i for i, g in enumerate(given) if g is v), -1) for v in leaves), *leaves, *given]
    return [*made, *model.state_dict().values()]


def same(want, got):
    if not isinstance(want, torch.Tensor):
        return not isinstance(got, torch.Tensor) and want == got
    if not isinstance(got, torch.Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    scale = float(want.double().nan_to_num(0, 0, 0).abs().max()) if want.numel() else 0.0
    return torch.allclose(want.double(), got.double(), rtol=0, atol={tolerance} * max(scale, 1e-6), equal_nan=True)


want, got = ran(False), ran(True)
good = len(want) == len(got) and all(map(same, want, got))
print("PASS" if good else "FAIL")
'''


def text(program: Program, options: Options, verdict: Verdict) -> str:
    what = " ".join(verdict.why.split())[:200].replace('"', "'").replace("\\", "/")
    return _TEMPLATE.format(
        title=what,
        seed=program.seed,
        classes=program.source().rstrip(),
        options=repr(options),
        calls=repr(list(program.calls)),
        inputs=", ".join(t for _, t in program.inputs),
        dynamic=program.dynamic,
        around=program.around or "contextlib.nullcontext()",
        tolerance=max(tolerance_of(program), 0.05 if rounds(options) else 0.0),
    )


def save(program: Program, options: Options, verdict: Verdict) -> Path:
    """Write the file; returns its path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"program_{program.seed}.py"
    path.write_text(text(program, options, verdict))
    return path
