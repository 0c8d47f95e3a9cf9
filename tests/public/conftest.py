"""One tiny Llama, compiled once for all tests of the public face; nothing is lowered, so no compiler runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import accelpass
from accelpass.api.generation import Generated, greedy, new_cache
from accelpass.view.report import Report

PASSES = [{"name": "int4_weights", "exclude": ["lm_head"], "group_size": 64}]
LAYERS = 2


@dataclass(frozen=True)
class Compiled:
    model: torch.nn.Module
    fast: Any
    generated: Generated
    again: Generated
    report: Report


def tiny_llama(layers: int = LAYERS) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128, tie_word_embeddings=True, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    model = tiny_llama()
    fast = accelpass.compile(model, PASSES, lowering="eager")
    cache = new_cache(model, 12)
    ids = torch.arange(5)[None]
    first = greedy(fast, ids, cache, 4)
    return Compiled(model, fast, first, greedy(fast, ids, cache, 4), accelpass.explain(fast))
