"""explain tells what ran for a model: graphs shared among blocks and instances, pieces that hooks made, code that runs uncompiled."""

import gc
import warnings

import pytest
import torch
from torch import nn

import accelpass
from accelpass.api.lookup import _inside

OPTIONS = {"passes": ["int8_weights"], "lowering": "eager"}
SITES = {f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")}


class Block(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.up, self.down, self.breaks = nn.Linear(64, 128), nn.Linear(128, 64), breaks

    def forward(self, x):
        h = torch.relu(self.up(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(h)


class Net(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def hook(linear):
    """Break the graph in each layer, as hooks of offloading libraries do."""
    forward = linear.forward
    before = torch._dynamo.disable(lambda: None)

    def hooked(*args):
        before()
        return forward(*args)

    linear.forward = hooked


def run(model):
    fast = torch.compile(model.eval(), backend="accelpass", options=OPTIONS)
    x = torch.randn(2, 4, 64)
    with torch.no_grad():
        assert (fast(x) - model(x)).norm() / model(x).norm() < 0.02
    return fast


@pytest.mark.parametrize("how", ["whole", "graph break in a block", "hooks"])
def test_every_layer_is_listed_under_its_path(how):
    model = Net(breaks=how == "graph break in a block")
    if how == "hooks":
        for block in model.blocks:
            hook(block.up)
            hook(block.down)
    report = accelpass.explain(run(model))
    assert report.passes["int8_weights"].took.keys() == SITES
    assert report.found["linear"] == 6
    assert report.weight_bytes[0] == sum(p.numel() for p in model.parameters()) * 4


def test_two_instances_each_with_their_own():
    first, second = Net(), Net()
    fast_first, fast_second = run(first), run(second)
    for fast in (fast_first, fast_second):
        assert accelpass.explain(fast).passes["int8_weights"].took.keys() == SITES
    assert "another instance" in " ".join(accelpass.explain(fast_second).notes)
    del second, fast_second
    gc.collect()
    assert accelpass.explain(fast_first).passes["int8_weights"].took.keys() == SITES


def test_weights_that_come_for_the_call_alone():
    """As offloading does it: the weights are gone when the report is made, which tells of the graphs all the same."""
    model = Net()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward = Net.forward

    def swapped(x):
        for block_number, block in enumerate(model.blocks):
            for name in ("up", "down"):
                layer = getattr(block, name)
                for part in ("weight", "bias"):
                    layer._parameters[part] = nn.Parameter(kept[f"blocks.{block_number}.{name}.{part}"].clone())
        return forward(model, x)

    model.forward = swapped
    found = accelpass.explain(run(model)).passes["int8_weights"]
    assert found.took or found.skipped


@pytest.mark.parametrize(
    ("in_graph", "in_model", "want"),
    [
        ("up.weight", "blocks.1.up.weight", (("blocks.1", ""), 2)),
        ("model.up.weight", "up.weight", (("", "model"), 2)),
        ("old.weight", "blocks.0.up.weight", (("blocks.0.up", "old"), 1)),
        ("up.weight", "up.weight", (("", ""), 2)),
    ],
)
def test_paths(in_graph, in_model, want):
    assert _inside(in_graph, in_model) == want


class TestRecompileLimit:
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 64)

        def forward(self, x, text):
            return self.up(x) * len(text)

    def test_the_last_graph_is_told_and_what_runs_uncompiled_is_reported(self):
        fast = torch.compile(self.Counting().eval(), backend="accelpass", options=OPTIONS)
        x = torch.randn(2, 64)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fast(x, "a"), fast(x, "bb")
            with pytest.warns(UserWarning, match=r"Counting.forward was compiled 3 times.*without the passes"):
                fast(x, "ccc")
            assert "runs it uncompiled" not in " ".join(accelpass.explain(fast).notes)
            fast(x, "dddd")
            assert "Counting.forward" in (note := " ".join(accelpass.explain(fast).notes))
            assert "runs it uncompiled, without the passes" in note

    def test_more_than_eight_graphs(self):
        fast = torch.compile(self.Counting().eval(), backend="accelpass", options=OPTIONS)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
            for number in range(12):
                fast(torch.randn(2, 64), "a" * number)
        report = accelpass.explain(fast)
        assert len(report.graphs) == 12

    def test_a_limit_that_somebody_set_stays(self):
        with torch._dynamo.config.patch(recompile_limit=5):
            run(Net())
            assert torch._dynamo.config.recompile_limit == 5
