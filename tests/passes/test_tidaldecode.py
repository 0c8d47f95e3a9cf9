"""The layer in which TidalDecode chooses anew, found on calibration data, against decoding token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import PassError
from accelpass.passes.core.plan import Plan
from accelpass.passes.kv_cache.tidaldecode import RESELECT
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
    (row,) = plan.tensors["tidaldecode/perplexity"].tolist()
    found = row[2:]
    best = 2 + found.index(min(found))
    assert all(map(math.isnan, row[:2])) and plan.tensors[RESELECT].tolist() == [best]
    assert float(plan.tensors["tidaldecode/dense"]) == pytest.approx(decoded(model), rel=1e-4)
    for at, perplexity in enumerate(found, 2):
        passes = [{**TIDAL, "by": by, "reselect": at}]
        got = decoded(model, plan=plan) if at == best else decoded(model, *passes)
        assert got == pytest.approx(perplexity, rel=1e-4)
    assert len({round(one, 4) for one in found}) > 1


def test_every_row_read_is_the_dense_model():
    found = accelpass.calibrate(llama(layers=LAYERS), [batch()], [{**TIDAL, "budget": 64}], progress=False)
    dense, (tried,) = (found.tensors[f"tidaldecode/{name}"] for name in ("dense", "perplexity"))
    assert torch.allclose(tried[2:], dense, rtol=1e-4)


@pytest.mark.slow
def test_several_layers_choose_anew():
    """Two searches and one more for the layer found first; no pair that was tried decodes better than the one taken."""
    model, wanted = llama(layers=6), {**TIDAL, "reselect": [2, 3]}
    plan = accelpass.calibrate(model, [batch(), batch(2)], [wanted], progress=False)
    rows, chosen = plan.tensors["tidaldecode/perplexity"], plan.tensors[RESELECT].tolist()
    assert rows.shape == (3, 6) and len(chosen) == 2 and 1 < chosen[0] < chosen[1]
    least = rows.nan_to_num(math.inf).amin(1)
    assert least[2] <= least[1] and rows[2].isnan().sum() == 3, "the other layer is not tried again"
    one = accelpass.calibrate(model, [batch()], [wanted], progress=False)
    got = decoded(model, {**TIDAL, "reselect": one.tensors[RESELECT].tolist()})
    assert got == pytest.approx(float(one.tensors["tidaldecode/perplexity"].nan_to_num(math.inf)[-1].min()), rel=1e-4)
    assert got == pytest.approx(decoded(model, plan=one), rel=1e-6)


def test_batches_of_more_than_ids_and_labels_are_refused():
    given = {**batch(), "attention_mask": torch.ones(1, PROMPT + ANSWER)}
    with pytest.raises(accelpass.OptionError, match="this one also has attention_mask"):
        accelpass.calibrate(llama(layers=LAYERS), [given], [TIDAL], progress=False)


def test_a_loss_that_is_not_finite_chooses_nothing():
    model = llama(layers=LAYERS)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(PassError, match="loss is not finite"):
        accelpass.calibrate(model, [batch()], [TIDAL], progress=False)


def test_a_model_without_positions_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)).eval()
    with pytest.raises(accelpass.OptionError, match="takes position_ids"):
        accelpass.calibrate(model, [batch()], [TIDAL], progress=False)


def test_a_model_without_layers_to_try():
    with pytest.raises(PassError, match="has none after first=1"):
        accelpass.calibrate(llama(layers=2), [batch()], [TIDAL], progress=False)


def test_a_layer_with_a_window_is_named():
    model = MistralForCausalLM(
        MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=4, **SIZES)
    ).eval()
    with pytest.raises(PassError, match=r"^tidaldecode: model\.layers\.0.*without padding$"):
        accelpass.calibrate(model, [batch()], [TIDAL], progress=False)
