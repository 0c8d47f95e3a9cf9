"""What taps gather is what the model computes there, and what they replace is what it goes on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accelpass import KVCache
from accelpass.ir.attention.lowering.lower import is_as_inserted
from accelpass.ir.attention.spec.op import ATTENTION, ATTENTION_STATS, is_attention
from accelpass.ir.attention.spec.spec import AttentionMass, LastQueries
from accelpass.ir.transform.tap import KINDS, CannotTap, Tap, points, tap
from accelpass.models_zoo import small
from tests.ir.test_shrink import captured
from tests.small_models import relative_error


def program_of(model: Any, ids: Tensor) -> tuple[Any, list[Any]]:
    return captured(lambda x: model(x, use_cache=False).logits, ids)


def run(program: Any, inputs: list[Any]) -> Tensor:
    from accelpass.ir import attention

    attention.lower(program)
    program.gm.recompile()
    with torch.no_grad():
        return program.gm(*program.tensors.binder()(inputs))[0]


def seen(model: Any, ids: Tensor, module: str) -> Tensor:
    """What a module is given, by a hook: the truth that taps are compared with."""
    found: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return found[0]


def test_points_of_a_decoder():
    program, _ = program_of(small.decoder(), torch.arange(6)[None])
    names = [p.name for p in points(program)]
    assert len(names) == len(set(names)) == 2 * 10 + 2  # of a layer each, and logits and stream of the model
    assert {p.kind for p in points(program)} == set(KINDS) - {"router"}
    assert "model.layers.1.mlp.act" in names and "model.layers.0.self_attn.heads" in names and "lm_head.logits" in names


@pytest.mark.parametrize(
    ("at", "module"),
    [("model.layers.1.mlp.act", "model.layers.1.mlp.down_proj"), ("*.0.*.heads", "model.layers.0.self_attn.o_proj")],
)
def test_what_is_gathered_is_what_the_module_is_given(at: str, module: str):
    model, ids = small.decoder(), torch.arange(8).reshape(2, 4)
    program, inputs = program_of(model, ids)
    taps = [
        Tap(at, lambda x: x.square().sum((0, 1))), Tap(at, lambda x: x.amax((0, 1)), "max", "top"),
        Tap(at, lambda x: x.amin((0, 1)), "min", "least"), Tap(at, lambda x: x[0, -1], "last", "token"),
    ]  # fmt: skip
    slots = tap(program, taps, "mine")
    assert len(slots) == 4 and all(name.startswith("mine.model.layers.") for name in slots)
    with torch.no_grad():
        assert relative_error(run(program, inputs), model(ids, use_cache=False).logits) < 1e-5
        program.gm(*program.tensors.binder()(inputs))
    held = dict(zip(slots, (t for n, t in _held(program, inputs) if n in set(slots.values())), strict=True))
    x = seen(model, ids, module)
    wanted = [2 * x.square().sum((0, 1)), x.amax((0, 1)), x.amin((0, 1)), x[0, -1]]
    for found, want in zip(held.values(), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def _held(program: Any, inputs: list[Any]) -> list[Any]:
    given = program.tensors.arguments(inputs)
    return list(zip(program.graph.find_nodes(op="placeholder"), given, strict=True))


def test_a_replaced_value_is_what_the_model_goes_on_with():
    model, ids = small.decoder(), torch.arange(8).reshape(2, 4)
    program, inputs = program_of(model, ids)
    tap(program, [Tap("model.layers.0.mlp.act", lambda x: x * (x > 0), "replace")], "mine")
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, given: (given[0] * (given[0] > 0),))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    handle.remove()
    assert relative_error(run(program, inputs), wanted) < 1e-5
    with torch.no_grad():
        assert relative_error(wanted, model(ids, use_cache=False).logits) > 1e-3


def test_a_stream_is_seen_before_and_after_its_block():
    model, ids = small.decoder(), torch.arange(8).reshape(2, 4)
    program, inputs = program_of(model, ids)
    slots = tap(program, [Tap("model.layers.0.residual", lambda x, y: (y - x).sum((0, 1)))], "mine")
    run(program, inputs)
    (found,) = (t for n, t in _held(program, inputs) if n in set(slots.values()))
    steps = seen(model, ids, "model.layers.1.input_layernorm") - seen(model, ids, "model.layers.0.input_layernorm")
    torch.testing.assert_close(found, steps.sum((0, 1)), atol=1e-5, rtol=1e-4)


SCORES = [AttentionMass(), LastQueries(AttentionMass(), 1), LastQueries(AttentionMass(), 3)]


def probabilities(model: Any, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What the model itself gives as attention probabilities, ``(batch, heads, queries, keys)``."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        made = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return list(made)


@pytest.mark.parametrize("padded", [False, True])
def test_probabilities_and_what_keys_get_of_them(padded: bool):
    model, ids = small.decoder(), torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]) if padded else None
    given = (ids, mask) if padded else (ids,)
    program, inputs = captured(lambda x, m=None: model(x, attention_mask=m, use_cache=False).logits, *given)
    taps = [Tap("*.1.*.probs", lambda p: p.nan_to_num(), "last")]
    taps += [Tap("*.1.*.mass", lambda m: m.clone(), "last", str(n), score=score) for n, score in enumerate(SCORES)]
    slots = tap(program, taps, "mine")
    kinds = [n.target for n in program.graph.nodes if is_attention(n)]
    assert kinds == [ATTENTION, ATTENTION_STATS], "one attention gives more, the other stays"
    with torch.no_grad():
        assert relative_error(run(program, inputs), model(*given, use_cache=False).logits) < 1e-5
    found = dict(_held(program, inputs))
    probs, *masses = (found[slot] for slot in slots.values())
    real = probabilities(model, ids, mask)[1] * (1 if mask is None else mask[:, None, :, None])
    torch.testing.assert_close(probs * (1 if mask is None else mask[:, None, :, None]), real, atol=1e-5, rtol=1e-4)
    for mass, last in zip(masses, (6, 1, 3), strict=True):
        want = real[:, :, -last:].sum(2).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(mass, want, atol=1e-5, rtol=1e-4)


def test_the_last_querys_mass_leaves_the_attention_as_it_is():
    program, _ = program_of(small.decoder(), torch.arange(6)[None])
    tap(program, [Tap("mass", lambda m: m.sum((0, 2)), score=LastQueries(AttentionMass(), 1))], "mine")
    assert all(is_as_inserted(n) for n in program.graph.nodes if is_attention(n))
    from accelpass.ir import attention

    assert set(attention.lower(program).values()) == {"origin"}


def test_keys_in_a_cache_are_not_tapped():
    model = small.decoder()
    cache = KVCache(model, 16)
    found: list[Any] = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        from accelpass.ir import attention

        found.append(attention.captured(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.arange(6)[None], past_key_values=cache)
    with pytest.raises(CannotTap, match="stand in a KVCache"):
        tap(found[0], [Tap("mass", lambda m: m.sum())], "mine")
    with pytest.raises(CannotTap, match="cannot be replaced"):
        tap(program_of(model, torch.arange(6)[None])[0], [Tap("probs", lambda p: p, "replace")], "mine")


def test_what_cannot_be_tapped_is_told():
    program, _ = program_of(small.decoder(), torch.arange(8).reshape(2, 4))
    with pytest.raises(CannotTap, match=r"gives \[64\].* for \[2, 4, 64\]"):
        tap(program, [Tap("act", lambda x: x.sum((0, 1)), "replace")], "mine")
    with pytest.raises(ValueError, match="use sum, max, min, last, replace"):
        Tap("act", lambda x: x, "mean")
