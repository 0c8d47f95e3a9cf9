"""Step caching on the diffusion transformers that diffusers has: captured whole, dense where nothing is left out, cheaper elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import accelpass
from accelpass.api.lookup import find
from accelpass.models_zoo import tiny_diffusers
from tests.passes.step_truth import denoise
from tests.sweep import quick

NAMES = quick([name for name in tiny_diffusers.NAMES if name != "dit"], "sd3")
TIMES = {"flux": [0.9, 0.6, 0.3]}
WINDOWED = {"pixart", "wan", "ltx_video"}
"""Models whose attentions over the latents see no text; SD3 has such a one beside its joint attention."""


def built(name: str) -> tuple[nn.Module, dict[str, Any], list[float]]:
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    call = {k: halved(v) for k, v in call.items()}
    return model.eval(), call, TIMES.get(name, [900, 600, 300])


def halved(given: Any) -> Any:
    """Equal halves: what one of them gives is then what the other gives."""
    return torch.cat([given[:1], given[:1]]) if isinstance(given, torch.Tensor) and given.shape[0] == 2 else given


def compiled(model: nn.Module, methods: dict[str, str], times: list[float]) -> Any:
    asked = {"name": "ditfastattn", "methods": methods, "timesteps": times, "window": 2}
    options = {"passes": [asked], "lowering": "eager"}
    return torch.compile(model, backend="accelpass", options=options, fullgraph=True)


@pytest.mark.parametrize("name", NAMES)
def test_dense_shared_halved_and_windowed(name: str) -> None:
    model, call, times = built(name)
    truth = denoise(model, call, times)
    fast = compiled(model, {}, times)
    for a, b in zip(denoise(fast, call, times), truth, strict=True):
        assert torch.equal(a, b)
    (graph,) = find(fast).graphs
    sites = graph.report.steps.sites
    # In tiny models every block has one attention over the latents; SD3's first has two.
    blocks = sum(
        len(m) for n, m in model.named_children() if n in ("transformer_blocks", "single_transformer_blocks", "blocks")
    )
    assert len(sites) == blocks + (name == "sd3") and len(set(sites)) == len(sites)

    torch._dynamo.reset()
    fast = compiled(model, dict.fromkeys(sites, "FCA"), times)
    found = denoise(fast, call, times)
    (graph,) = find(fast).graphs
    report, record = graph.report.steps, graph.report.records[0]
    assert not record.skipped and set(record.took) == set(sites)
    full, half, share = report.flops
    assert full == report.dense and share < half < 0.97 * full
    for step in (0, 1):  # both halves are alike, so that one stands for both exactly
        torch.testing.assert_close(found[step], truth[step], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found[2], truth[2], atol=1e-3) and found[2].isfinite().all()
    for a, b in zip(denoise(fast, call, times), found, strict=True):
        assert torch.equal(a, b)
    assert all(b.name.partition(":")[2].startswith("output") for b in accelpass.state(fast))

    # Windows, where they have a meaning.
    torch._dynamo.reset()
    fast = compiled(model, dict.fromkeys(sites, "FW"), times[:2])
    found = denoise(fast, call, times[:2])
    (graph,) = find(fast).graphs
    record = graph.report.records[0]
    if name in WINDOWED:
        assert set(record.took) == set(sites) and not record.skipped
        assert not torch.equal(found[1], truth[1])
        assert [b.name for b in accelpass.state(fast)] == [f"{s}:residual" for s in sites]
    else:
        joint = set(sites) - ({s for s in sites if s.endswith("attn2")} if name == "sd3" else set())
        assert set(record.skipped) == joint
        for why in record.skipped.values():
            assert "a window along both has no meaning" in why
        if joint == set(sites):
            assert torch.equal(found[1], truth[1]), "skipped sites stay dense"
            assert set(graph.report.steps.flops) == {graph.report.steps.dense}
