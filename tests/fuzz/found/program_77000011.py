"""call 0: eager answers, compiled raises PassError: compiling with cpu_gemv, lazyllm, moa failed: RuntimeError: Argument 'numpy_t' of Node 'matmul' was used before it has been defined! Please check that

Made by ``make fuzz`` from program 77000011, and shrunk.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten


class Block(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        v1 = torch.square(F.relu(x))
        v2 = v1.to(torch.float32)
        return v2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a1 = nn.ModuleList([Block() for _ in range(3)])
        self.w9 = nn.Parameter(torch.randn(8, dtype=torch.float64) * 0.3)
        self.w10 = nn.Parameter(torch.randn(8, 16, dtype=torch.float64) * 0.3)
        self.w12 = nn.Parameter(torch.randn(8, 16, dtype=torch.float64) * 0.3)
        self.a14 = nn.Linear(16, 8, bias=False, dtype=torch.float64)
        self.a25 = nn.Linear(8, 16, dtype=torch.float64)
        self.a28 = nn.Linear(16, 32, bias=False, dtype=torch.float64)
        self.w30 = nn.Parameter(torch.randn(32, dtype=torch.float64) * 0.3)
        self.w31 = nn.Parameter(torch.randn(16, 32, dtype=torch.float64) * 0.3)
        self.w33 = nn.Parameter(torch.randn(16, 32, dtype=torch.float64) * 0.3)
        self.a48 = nn.Linear(32, 16, dtype=torch.float64)

    def forward(self, x, ids, mask):
        v2 = self.a1[1](x)
        v3 = self.a1[0](v2)
        v4 = self.a1[1](v3)
        v8 = x.to(dtype=torch.float64)
        v11 = v8.matmul(self.w10.T) + self.w9
        v13 = nn.functional.linear(input=v8, weight=self.w12)
        v15 = self.a14(v8)
        v16 = v11.unflatten(-1, (1, 8)).transpose(1, 2)
        v17 = v13.unflatten(-1, (1, 8)).transpose(1, 2)
        v18 = v15.unflatten(-1, (1, 8)).transpose(1, 2)
        v19 = v17.transpose(-2, -1)
        v20 = v16.matmul(v19)
        v21 = v20 / torch.sqrt(torch.tensor(8.0)).to(v20.dtype)
        v22 = torch.softmax(v21, dim=-1)
        v23 = torch.einsum("bhqk,bhkd->bhqd", v22, v18)
        v24 = v23.transpose(1, 2).flatten(-2)
        v26 = self.a25(v24)
        v27 = v8 + v26
        v29 = self.a28(v27)
        v32 = v27 @ self.w31 + self.w30
        v34 = v27 @ self.w33
        v35 = v29.view(*v29.shape[:-1], -1, 8).movedim(2, 1)
        v36 = v32.view(*v32.shape[:-1], -1, 8).movedim(2, 1)
        v37 = v34.view(*v34.shape[:-1], -1, 8).movedim(2, 1)
        v38 = v36.transpose(-2, -1)
        v39 = torch.matmul(v35, v38)
        v46 = torch.einsum("bhqk,bhkd->bhqd", v39, v37)
        v47 = v46.transpose(1, 2).flatten(-2)
        v49 = self.a48(v47)
        v50 = v27 + v49
        return v50


OPTIONS = {
    "lowering": "eager",
    "passes": [
        {"name": "cpu_gemv"},
        {"name": "lazyllm", "keep": (1.0, 1.0)},
        {"name": "moa", "alpha": 0.0, "beta": 1.0, "sinks": 4, "block": 4, "reserve": 8},
    ],
}
CALLS = [(2, 5, 3)]  # batch, tokens, tokens of a context


def inputs(call, b, t, s):
    torch.manual_seed(77000011 + call)
    return [torch.randn(b, t, 16), torch.randint(0, 12, (b, t)), torch.rand(b, 1, t, t) > 0.3]


def ran(compile_it):
    """Outputs of each call or that it raised, its inputs afterwards, and the model's state."""
    torch._dynamo.reset()
    torch.manual_seed(77000011)
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
