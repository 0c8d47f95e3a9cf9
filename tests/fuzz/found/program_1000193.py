"""call 0: output 0: differs by 1.2e+00 of its largest value

Made by ``make fuzz`` from program 1000193, and shrunk.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401
from torch.utils._pytree import tree_flatten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w2 = nn.Parameter(torch.randn(8, 16) * 0.3)
        self.w6 = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.w26 = nn.Parameter(torch.randn(16) * 0.3)
        self.w27 = nn.Parameter(torch.randn(8, 16) * 0.3)

    def forward(self, x):
        v3 = x @ self.w2
        v7 = x.matmul(self.w6.T)
        v10 = v7.reshape(v7.size(0), -1, 1, 8).permute(0, 2, 1, 3)
        v28 = torch.matmul(v10, self.w27) + self.w26
        return (v28, v3)


OPTIONS = {"lowering": "aten", "passes": ["int8_weights"]}
CALLS = [(3, 1, 2)]  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed(1000193 + call)
    return [torch.randn(b, t, 8)]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed(1000193)
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
    return torch.allclose(want.double(), got.double(), rtol=0, atol=0.05 * max(scale, 1e-6), equal_nan=True)


want, got = ran(False), ran(True)
good = len(want) == len(got) and all(map(same, want, got))
print("PASS" if good else "FAIL")
