"""What a compiled model remembers is read and set by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import accelpass
from accelpass import KVCache
from accelpass.ir.core.program import Program
from accelpass.ir.transform.tap import Tap, tap
from accelpass.models_zoo import small
from accelpass.passes.core.base import Done, Pass, Record


def compiled(model, *passes):
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager"})


@dataclass(frozen=True)
class Gathering(Pass):
    """A pass that is nothing but a tap."""

    name: ClassVar[str] = "gathering"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "sums what MLPs hold"

    def apply(self, program: Program, record: Record) -> None:
        for name in tap(program, [Tap("act", lambda x: x.sum((0, 1)))], self.name):
            record.take(name, Done("gathered"))


def test_what_taps_gathered_is_read_set_and_reset_over_prompt_and_answer():
    model, ids = small.decoder(), torch.arange(8)[None]
    fast, cache = compiled(model, Gathering()), KVCache(model, 16)
    seen = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].sum((0, 1))))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    with torch.no_grad():
        fast(ids[:, :7], past_key_values=cache)
        fast(ids[:, 7:], past_key_values=cache)
    name = "gathering.model.layers.1.mlp.act"
    found = accelpass.read(fast, "gathering.*")
    assert set(found) == {"gathering.model.layers.0.mlp.act", name}
    torch.testing.assert_close(found[name], seen[0], atol=1e-4, rtol=1e-4)
    accelpass.write(fast, {name: torch.arange(64.0), "gathering.model.layers.0.mlp.act": 3.0})
    assert torch.equal(accelpass.read(fast, name)[name], torch.arange(64.0))
    assert accelpass.read(fast, "*.0.mlp.act")["gathering.model.layers.0.mlp.act"].eq(3).all()
    accelpass.reset(fast)
    assert not accelpass.read(fast, name)[name].any()


@dataclass(frozen=True)
class Steering(Pass):
    """Adds a vector that the user writes to the stream behind a block."""

    name: ClassVar[str] = "steering"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "adds a vector to the stream"

    def apply(self, program: Program, record: Record) -> None:
        for name in tap(program, [Tap("*.0.residual", lambda x, y, v: y + v, "replace", written=True)], self.name):
            record.take(name, Done("steered"))


def test_a_stream_is_steered_by_what_is_written():
    model, ids = small.decoder(), torch.arange(8)[None]
    fast, vector = compiled(model, Steering()), torch.randn(32, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[1]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        torch.testing.assert_close(fast(ids, use_cache=False).logits, plain, atol=1e-5, rtol=1e-5)
        accelpass.write(fast, {"steering.model.layers.0.residual": vector})
        handle = layer.register_forward_pre_hook(lambda _, given: (given[0] + vector, *given[1:]))
        wanted = model(ids, use_cache=False).logits
        handle.remove()
        torch.testing.assert_close(fast(ids, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted, plain, atol=1e-2)
        accelpass.reset(fast)
        torch.testing.assert_close(fast(ids, use_cache=False).logits, plain, atol=1e-5, rtol=1e-5)


def test_two_models_gather_apart():
    one, two = small.decoder(0), small.decoder(1)
    ids = torch.arange(8)[None]
    fast = [compiled(one, Gathering())]
    fast.append(torch.compile(two, backend="accelpass", options={"passes": [Gathering()], "lowering": "eager"}))
    with torch.no_grad():
        for f in fast:
            f(ids, use_cache=False)
    a, b = (accelpass.read(f, "*.0.mlp.act")["gathering.model.layers.0.mlp.act"] for f in fast)
    assert not torch.allclose(a, b)
    with torch.no_grad():
        fast[0](ids, use_cache=False)
    torch.testing.assert_close(accelpass.read(fast[0], "*.0.mlp.act")["gathering.model.layers.0.mlp.act"], 2 * a)
    torch.testing.assert_close(accelpass.read(fast[1], "*.0.mlp.act")["gathering.model.layers.0.mlp.act"], b)


def test_buffers_of_a_cache_are_read_by_layer():
    model, ids = small.decoder(), torch.arange(8)[None]
    fast, cache = compiled(model, {"name": "h2o", "budget": 0.5}), KVCache(model, 16)
    with torch.no_grad():
        fast(ids, past_key_values=cache)
    found = accelpass.read(fast, "kv.keys*")
    assert len(found) == 2 and all("@cache 0, layer" in name for name in found)


def test_what_is_not_there_is_told():
    model, ids = small.decoder(), torch.arange(8)[None]
    fast = compiled(model, Gathering())
    with pytest.raises(accelpass.AccelpassError, match="call the model once"):
        accelpass.read(fast)
    with torch.no_grad():
        fast(ids, use_cache=False)
    with pytest.raises(accelpass.AccelpassError, match=r"there is: gathering\.model\.layers\.0\.mlp\.act"):
        accelpass.read(fast, "other.*")
    with pytest.raises(accelpass.AccelpassError, match=r"is \[64\]; what was given is \[3\]"):
        accelpass.write(fast, {"gathering.*": torch.zeros(3)})
