"""call 0: output 0: differs by 1.8e-03 of its largest value

Made by ``make fuzz`` from program 3001206, and shrunk.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401
from torch.utils._pytree import tree_flatten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a1 = nn.Embedding(12, 32)
        self.a3 = nn.Linear(32, 12, bias=False)
        self.a3.weight = self.a1.weight

    def forward(self, ids):
        v2 = self.a1.weight[ids]
        v8 = self.a3(v2)
        return v8


OPTIONS = {"lowering": "eager", "passes": ["int8_weights"]}
CALLS = [(1, 1, 1)]  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed(3001206 + call)
    return [torch.randint(0, 12, (b, t))]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed(3001206)
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
