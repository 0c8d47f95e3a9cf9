"""The layer in which TidalDecode chooses anew, found on calibration data, against decoding token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import PassError
from accelpass.passes.kv_cache.tidaldecode import RESELECT
from accelpass.passes.plan import Plan
from tests.passes.test_lazyllm import SIZES, ids, llama

PROMPT, ANSWER, LAYERS = 18, 7, 4
TIDAL = {"name": "tidaldecode", "budget": 4, "first": 1}


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    given = ids(PROMPT + ANSWER, seed=seed)
    labels = given.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": given, "labels": labels}


def decoded(model: torch.nn.Module, *passes: dict[str, object], plan: Plan | None = None) -> float:
    """Perplexity of the answer, read token by token."""
    torch._dynamo.reset()
    options = {"passes": list(passes), "plan": plan, "lowering": "eager"}
    fast, cache, given = (
        torch.compile(model, backend="accelpass", options=options),
        KVCache(model, 64),
        ids(PROMPT + ANSWER),
    )
    losses = []
    with torch.no_grad():
        logits = fast(given[:, :PROMPT], past_key_values=cache).logits[0, -1]
        for at in range(PROMPT, PROMPT + ANSWER):
            losses.append(float(F.cross_entropy(logits, given[0, at])))
            logits = fast(given[:, at : at + 1], past_key_values=cache).logits[0, -1]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["layer", "kv_head"])
def test_the_layer_is_the_one_that_decodes_best(by, tmp_path):
    model = llama(layers=LAYERS)
    plan = accelpass.calibrate(model, [batch()], [{**TIDAL, "by": by}], progress=False)
    plan.save(tmp_path / "tidal.json")
    plan = Plan.load(tmp_path / "tidal.json")
    dense, *found = plan.tensors["tidaldecode/perplexity"].tolist()
    best = 2 + found.index(min(found))
    assert int(plan.tensors[RESELECT]) == best
    assert dense == pytest.approx(decoded(model), rel=1e-4)
    for at, perplexity in enumerate(found, 2):
        passes = [{**TIDAL, "by": by, "reselect": at}]
        got = decoded(model, plan=plan) if at == best else decoded(model, *passes)
        assert got == pytest.approx(perplexity, rel=1e-4)
    assert len({round(one, 4) for one in found}) > 1


def test_every_row_read_is_the_dense_model():
    found = accelpass.calibrate(llama(layers=LAYERS), [batch()], [{**TIDAL, "budget": 64}], progress=False)
    dense, *others = found.tensors["tidaldecode/perplexity"].tolist()
    assert others == pytest.approx([dense] * len(others), rel=1e-4)


def test_a_model_without_layers_to_try():
    with pytest.raises(PassError, match="has none after first=1"):
        accelpass.calibrate(llama(layers=2), [batch()], [TIDAL], progress=False)


def test_a_layer_with_a_window_is_named():
    model = MistralForCausalLM(
        MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=4, **SIZES)
    ).eval()
    with pytest.raises(PassError, match=r"^tidaldecode: model\.layers\.0.*without padding$"):
        accelpass.calibrate(model, [batch()], [TIDAL], progress=False)
