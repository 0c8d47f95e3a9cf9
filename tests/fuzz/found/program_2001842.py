"""call 0: output 0: is input 0 and -1

Made by ``make fuzz`` from program 2001842, and shrunk.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401
from torch.utils._pytree import tree_flatten


class Model(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        v1 = x.type_as(x)
        v1.squeeze_(0)
        return v1


OPTIONS = {"lowering": "eager"}
CALLS = [(2, 6, 7)]  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed(2001842 + call)
    return [torch.randn(b, t, 8)]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed(2001842)
    model, made = Model().eval(), []
    fast = torch.compile(model, backend="accelpass", options=OPTIONS, dynamic=None) if compile_it else model
    for call, sizes in enumerate(CALLS):
        given = inputs(call, *sizes)
        with torch.no_grad(), contextlib.nullcontext():
            try:
                answer = fast(*given)
            except Exception as error:
                made.append("raised")
                print(f"compiled {compile_it}: {type(error).__name__}: {str(error)[:200]}")
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
    return torch.allclose(want.double(), got.double(), rtol=0, atol=2e-05 * max(scale, 1e-6), equal_nan=True)


want, got = ran(False), ran(True)
good = len(want) == len(got) and all(map(same, want, got))
print("PASS" if good else "FAIL")
