"""call 0: eager answers, compiled raises NameError: name 's27' is not defined

Made by ``make fuzz`` from program 1000473, and shrunk.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401
from torch.utils._pytree import tree_flatten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a18 = nn.Conv1d(16, 32, 1, bias=False)
        self.w24 = nn.Parameter(torch.randn(8) * 0.3)
        self.w25 = nn.Parameter(torch.randn(8, 32) * 0.3)

    def forward(self, x):
        q, _, _ = x.split([16, 8, 8], dim=-1)
        v19 = self.a18(q.transpose(1, 2)).transpose(1, 2)
        v26 = torch.einsum("...i,oi->...o", v19, self.w25) + self.w24
        return v26


OPTIONS = {"lowering": "eager"}
CALLS = [(2, 5, 3)]  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed(1000473 + call)
    return [torch.randn(b, t, 32)]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed(1000473)
    model, made = Model().eval(), []
    fast = torch.compile(model, backend="accelpass", options=OPTIONS, dynamic=True) if compile_it else model
    for call, sizes in enumerate(CALLS):
        given = inputs(call, *sizes)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
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
    return torch.allclose(want.double(), got.double(), rtol=0, atol=0.04 * max(scale, 1e-6), equal_nan=True)


want, got = ran(False), ran(True)
good = len(want) == len(got) and all(map(same, want, got))
print("PASS" if good else "FAIL")
