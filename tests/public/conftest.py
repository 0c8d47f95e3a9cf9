"""One tiny Llama, compiled once for all tests of the public face; nothing is lowered, so no compiler runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import accelpass
from accelpass.api.generation import Generated, greedy, new_cache
from accelpass.cli.main import app
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


@pytest.fixture
def cli() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model folder with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(1).save_pretrained(path)
    words = {c: i for i, c in enumerate(["<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path
