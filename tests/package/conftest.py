"""Two packages, compiled once for all tests here: compiling takes longer than all that is tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import accelpass
from accelpass.backends.package.report import PackageReport
from tests.package.decoding import PASSES, prompts
from tests.public.conftest import tiny_llama
from tests.small_models import Mlp


@dataclass
class Packaged:
    """A model and its package."""

    model: torch.nn.Module
    path: Path
    report: PackageReport


def words() -> Tokenizer:
    """A tokenizer of 128 numbers, written as words."""
    made = Tokenizer(WordLevel({str(n): n for n in range(128)}, unk_token="0"))
    made.pre_tokenizer = Whitespace()
    return made


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """A module without a cache, its batch dynamic."""
    torch.manual_seed(0)
    model, path = Mlp().eval(), tmp_path_factory.mktemp("mlp") / "m.pt2"
    example = torch.randn(3, 64)
    report = accelpass.package(model, example, ["int8_weights"], path=path, dynamic_shapes={"x": {0: "batch"}})
    return Packaged(model, path, report)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """A language model with room for 24 tokens of two sequences."""
    model, path = tiny_llama(1), tmp_path_factory.mktemp("decoder") / "m.pt2"
    model.generation_config.pad_token_id = 0
    example = {"input_ids": prompts(2, 7), "logits_to_keep": 1}
    report = accelpass.package(model, example, PASSES, path=path, cache=24, tokenizer=words())
    return Packaged(model, path, report)
