"""``search_bits``: measured scores, the integer program against brute force, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.api.calibration.bit_search import BitSearch, Group, sqnr, ssim
from accelpass.ir.linear.rows import IntRows
from accelpass.passes.quantization.bases.allocation import least_cost
from tests.sweep import examples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2, self.ff, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.ff(torch.tanh(self.attn2(x)))))


GROUPS = (Group("content", ("attn2", "ff"), sqnr), Group("quality", ("*",), sqnr))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def found(net: Net) -> BitSearch:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    return accelpass.search_bits(net, lambda m: m(x), 6.0, groups=GROUPS, progress=False)


def test_scores_are_those_of_one_linear_rounded_alone(net: Net, found: BitSearch) -> None:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    form = IntRows(4, symmetric=True)
    with torch.no_grad():
        want, rounded = net(x), Net()
        rounded.load_state_dict(net.state_dict())
        rounded.ff.weight.copy_(form.unpack(form.pack(net.ff.weight), torch.float32))
        noise = (rounded(x) - want).double()
    score = 10 * torch.log10(want.double().square().sum() / noise.square().sum())
    assert found.scores["ff"][0] == pytest.approx(float(score), rel=1e-5)
    assert all(fine > coarse for coarse, fine in found.scores.values())
    assert found.groups == {"attn2": "content", "ff": "content", "out": "quality"}


def test_the_average_is_kept_and_the_model_is_as_it_was(net: Net, found: BitSearch) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert 4 <= found.average <= 6.02 and found.error > 0
    x = torch.randn(9, 16)
    for average in (4.0, 8.0):
        made = accelpass.search_bits(net, lambda m: m(x), average, groups=GROUPS, progress=False)
        assert set(made.bits.values()) == {int(average)}

    def broken(model: nn.Module) -> Tensor:
        if not torch.equal(model.ff.weight, before["ff.weight"]):
            raise KeyError("stopped in the middle")
        return model(x)

    with pytest.raises(KeyError):
        accelpass.search_bits(net, broken, 6.0, groups=GROUPS, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_its_bits_are_options_of_a_pass(net: Net, found: BitSearch) -> None:
    torch._dynamo.reset()
    plan = accelpass.calibrate(
        net, [{"x": torch.randn(5, 16)}], [{"name": "mixdq", "sites": found.sites}], progress=False
    )
    fast = torch.compile(net, backend="accelpass", options={"plan": plan, "lowering": "eager"})
    with torch.no_grad():
        fast(torch.randn(5, 16))
    for path, done in accelpass.explain(fast).passes["mixdq"].took.items():
        assert done.what.endswith("int8" if found.bits[path] == 8 else "int_rows"), path


@settings(max_examples=examples(15), deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**16), st.floats(0, 1))
def test_the_program_is_as_good_as_trying_all(count: int, seed: int, room: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    bits = (2, 4, 8)
    costs = {
        f"l{i}": torch.rand(3, generator=rng, dtype=torch.float64).sort(descending=True).values for i in range(count)
    }
    sizes = {path: int(torch.randint(1, 9, (), generator=rng)) for path in costs}
    total = sum(sizes.values())
    within = (2 + 6 * room) * total
    tables = {
        p: torch.stack([c, torch.tensor([float(b * sizes[p]) for b in bits], dtype=torch.float64)])
        for p, c in costs.items()
    }
    got = least_cost("test", tables, within, total)
    tried = [
        sum(float(costs[p][i]) for p, i in zip(costs, combo, strict=True))
        for combo in itertools.product(range(3), repeat=count)
        if sum(bits[i] * sizes[p] for p, i in zip(costs, combo, strict=True)) <= within + 1e-9
    ]
    assert sum(float(costs[p][i]) for p, i in got.items()) == pytest.approx(min(tried), abs=1e-6)


def test_metrics() -> None:
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 8, 8, generator=rng)
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image + 0.1 * torch.randn(image.shape, generator=rng), image) < 0.999
    assert sqnr(image * 0.9, image) == pytest.approx(20)
    with pytest.raises(accelpass.OptionError, match="ssim compares images"):
        ssim(torch.ones(3), torch.ones(3))


def test_what_is_refused(net: Net) -> None:
    def run(model: nn.Module) -> Tensor:
        return model(torch.ones(1, 16))

    with pytest.raises(accelpass.PassError, match=r"bits=3\.02 cannot be met with these choices; the least is 4\.00"):
        accelpass.search_bits(net, run, 3.0, groups=GROUPS, progress=False)
    with pytest.raises(accelpass.OptionError, match="use some of 2, 3, 4, 6, 8"):
        accelpass.search_bits(net, run, 4.0, choices=(5,), progress=False)
    with pytest.raises(accelpass.OptionError, match=r"no nn\.Linear is named by groups"):
        accelpass.search_bits(net, run, 4.0, groups=[Group("none", ("nothing",), sqnr)], progress=False)


def test_inputs_have_bits_beside_those_of_weights(net: Net, found: BitSearch) -> None:
    """One input is rounded at a time, in the range that it has; whole allocations are compared with the weights as they were found."""
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    made = accelpass.search_bits(
        net, lambda m: m(x), 6.0, groups=GROUPS, of="activations", beside=found, progress=False
    )
    with torch.no_grad():
        want, read = net(x), torch.tanh(net.attn2(x))
        step = read.abs().amax() / 7
        alone = net.out(torch.relu(net.ff((read / step).round().clamp(-8, 7) * step)))
    assert made.scores["ff"][0] == pytest.approx(sqnr(alone, want), rel=1e-4)
    assert made.option == "activation_bits" and 4 <= made.average <= 6.02
    assert made.error > found.error and net.ff._forward_pre_hooks == {}
    assert all(set(s) == {"bits", "activation_bits"} for s in made.sites.values())
    torch._dynamo.reset()
    plan = accelpass.calibrate(net, [{"x": x}], [{"name": "mixdq", "sites": made.sites}], progress=False)
    fast = torch.compile(net, backend="accelpass", options={"plan": plan, "lowering": "eager"})
    with torch.no_grad():
        assert 0.2 < float((fast(x) - want).square().mean()) / made.error < 5
    with pytest.raises(accelpass.AccelpassError, match="use 4, 8 or both"):
        accelpass.search_bits(net, lambda m: m(x), 6.0, choices=(2, 8), of="activations", progress=False)
    with pytest.raises(accelpass.AccelpassError, match="of='inputs'"):
        accelpass.search_bits(net, lambda m: m(x), 6.0, of="inputs", progress=False)
    with pytest.raises(accelpass.AccelpassError, match="did not call"):
        accelpass.search_bits(
            net, lambda m: m.out(torch.randn(3, 32)), 6.0, groups=GROUPS, of="activations", progress=False
        )
