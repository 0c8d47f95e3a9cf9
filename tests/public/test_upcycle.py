"""A mixture made of dense models: where each parameter comes from, and what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import accelpass
from accelpass.models_zoo import small
from tests.small_models import relative_error

IDS = torch.arange(12).view(2, 6)


def parallel(seed: int) -> Any:
    """A Cohere: attention and MLP read one norm, as the paper's blocks do."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(seed)
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.25, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def seen(model: Any, path: str, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What a module is given, and what it gives."""
    found: list[Any] = []

    def hook(_: Any, args: Any, kwargs: Any, made: Any) -> None:
        found.append((args, kwargs, made[0] if isinstance(made, tuple) else made))

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return found[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [parallel, small.decoder])
def test_a_mixture_of_copies_is_the_dense_model(build: Any):
    """With all MLPs in force; of fewer, the gates do not sum to 1."""
    model = build(0)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        for form in ("expert_kv", "shared_kv"):
            whole = accelpass.upcycle([model, copy.deepcopy(model), model], attention=form, top_k=3).model
            assert relative_error(whole(IDS, use_cache=False).logits, want) < 1e-4
            one = accelpass.upcycle([model, model], attention=form).model
            assert relative_error(one(IDS, use_cache=False).logits, want) > 1e-2
        assert relative_error(model(IDS, use_cache=False).logits, want) == 0, "the model is not changed"


@pytest.mark.parametrize("top_k", [1, 2])
def test_each_layer_is_the_cards_sum(top_k: int):
    models = [parallel(n) for n in range(3)]
    made = accelpass.upcycle(models, top_k=top_k, seed=5).model
    with torch.no_grad():
        for layer in range(2):
            path = f"model.layers.{layer}.self_attn"
            args, kwargs, got = seen(made, path, IDS)
            h = args[0] if args else kwargs.pop("hidden_states")
            gates = (h @ made.get_submodule(path).router.weight.T).softmax(-1)
            each = [m.get_submodule(path)(hidden_states=h, **kwargs)[0] for m in models]
            assert relative_error(got, sum(gates[..., [j]] * one for j, one in enumerate(each))) < 1e-5
            args, kwargs, got = seen(made, f"model.layers.{layer}.mlp", IDS)
            (h,) = args
            p = (h @ made.get_submodule(f"model.layers.{layer}.mlp").router.weight.T).softmax(-1)
            keep = p >= p.topk(top_k, -1).values[..., -1:]
            each = [m.get_submodule(f"model.layers.{layer}.mlp")(h) for m in models]
            want = sum((p * keep)[..., [j]] * one for j, one in enumerate(each))
            assert relative_error(got, want) < 1e-5


def test_where_parameters_come_from():
    models = [parallel(n) for n in range(3)]
    for form in ("expert_kv", "shared_kv"):
        made = accelpass.upcycle(models, attention=form)
        held = dict(made.model.named_parameters())
        assert sorted([*made.copied, *made.averaged, *made.created]) == sorted(held)
        assert {n.rpartition(".")[0].rpartition(".")[2] for n in made.created} == {"router"}
        assert len(made.created) == 4
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
            assert name in made.averaged
            torch.testing.assert_close(held[name], torch.stack([m.get_parameter(name) for m in models]).mean(0))
        for j, m in enumerate(models):
            own = m.model.layers[1]
            block = made.model.model.layers[1]
            expert = block.self_attn.experts[j]
            assert torch.equal(expert.q_proj.weight, own.self_attn.q_proj.weight)
            assert torch.equal(expert.o_proj.weight, own.self_attn.o_proj.weight)
            up = torch.cat([own.mlp.gate_proj.weight, own.mlp.up_proj.weight])
            assert torch.equal(block.mlp.gate_up_proj[j], up)
            assert torch.equal(block.mlp.down_proj[j], own.mlp.down_proj.weight)
            if form == "expert_kv":
                assert torch.equal(expert.k_proj.weight, own.self_attn.k_proj.weight)
            else:
                mean = torch.stack([o.model.layers[1].self_attn.k_proj.weight for o in models]).mean(0)
                torch.testing.assert_close(expert.k_proj.weight, mean)
                assert expert.k_proj is block.self_attn.experts[0].k_proj


@pytest.mark.parametrize("form", ["expert_kv", "shared_kv"])
def test_it_generates_with_a_cache(form: str):
    made = accelpass.upcycle([parallel(0), parallel(1)], attention=form).model
    with torch.no_grad():
        given = IDS + 1  # 0 is padding
        got = made.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
        ids = given
        for _ in range(4):
            ids = torch.cat([ids, made(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids[:, : got.shape[1]]) and got.shape[1] > 7


def test_equal_seeds_give_equal_routers():
    one, same, other = (accelpass.upcycle([small.decoder(), small.decoder(1)], seed=s).model for s in (1, 1, 2))
    first, again, third = (m.model.layers[0].mlp.router.weight for m in (one, same, other))
    assert torch.equal(first, again) and not torch.equal(first, third)


def test_what_cannot_be_upcycled_says_so():
    two = [small.decoder(0), small.decoder(1)]
    with pytest.raises(accelpass.AccelpassError, match="two models or more; 1 given"):
        accelpass.upcycle(two[:1])
    with pytest.raises(accelpass.OptionError, match="use expert_kv or shared_kv"):
        accelpass.upcycle(two, attention="keys")
    with pytest.raises(accelpass.OptionError, match=r"top_k=3 .* use 1 to 2"):
        accelpass.upcycle(two, top_k=3)
    with pytest.raises(accelpass.AccelpassError, match=r"model 1 is of another form .* missing"):
        accelpass.upcycle([two[0], small.decoder(layers=3)])
    with pytest.raises(accelpass.AccelpassError, match="0 attentions"):
        accelpass.upcycle([small.tiny_lm(0), small.tiny_lm(1)])
