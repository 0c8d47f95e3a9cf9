"""``accelpass.evaluate``, and the commands that quantize a model into a folder and score it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import Result

import accelpass
from tests.public.conftest import tiny_llama

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
def test_evaluate_is_what_its_words_say() -> None:
    torch._dynamo.reset()
    model, ids = tiny_llama(1), torch.randint(128, (1, 45), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    options = {"passes": [{"name": "int4_weights", "group_size": 32}], "lowering": "eager"}
    found = accelpass.evaluate(model, ids, options, window=20, on_window=done.append)
    assert done == [19, 38, 42] and found.tokens == 42
    fast = torch.compile(model, backend="accelpass", options=options)
    with torch.no_grad():
        pairs = [(model(w).logits[0, :-1], fast(w).logits[0, :-1], w[0, 1:]) for w in ids.split(20, 1)]
    dense, ours, want = (torch.cat([p[i] for p in pairs]) for i in range(3))
    assert found.dense == pytest.approx(float(F.cross_entropy(dense, want).exp()), rel=1e-4)
    assert found.perplexity == pytest.approx(float(F.cross_entropy(ours, want).exp()), rel=1e-4)
    assert found.agreement == pytest.approx(float((dense.argmax(-1) == ours.argmax(-1)).float().mean()))
    kl = F.kl_div(ours.log_softmax(-1), dense.softmax(-1), reduction="batchmean")
    assert found.divergence == pytest.approx(float(kl), rel=1e-2) and found.divergence > 0
    same = accelpass.evaluate(model, ids, {"passes": [], "lowering": "eager"})
    assert same.ratio == pytest.approx(1.0, abs=1e-4) and same.agreement == 1 and same.divergence < 1e-5


def test_what_evaluate_refuses() -> None:
    with pytest.raises(accelpass.OptionError, match="two tokens or more"):
        accelpass.evaluate(tiny_llama(1), torch.ones(1, 1).long())
    with pytest.raises(accelpass.OptionError, match="gives no logits"):
        accelpass.evaluate(_Silent(), torch.ones(1, 4).long(), {"lowering": "eager"})


class _Silent(nn.Module):
    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": ids + 1}


@pytest.mark.slow
def test_quantize_then_load_and_score(cli: Callable[..., Result], folder: Path, prose: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    out = tmp_path / "packed"
    typed = ("--group-size", 32, "--samples", 4, "--tokens", 64, "--data", prose)
    shown = cli("quantize", folder, "-o", out, "--method", "gptq", "--bits", 3, *typed)
    assert shown.exit_code == 0, shown.output
    assert "gptq: 7 weights" in shown.stdout and f"accelpass.load(model, {str(out)!r})" in shown.stdout
    model = tiny_llama(1)
    fast = accelpass.load(model, out, lowering="eager")
    with torch.no_grad():
        logits = fast(torch.arange(9)[None]).logits
    assert logits.isfinite().all()
    assert len(accelpass.explain(fast).passes["gptq"].took) == 7
    again = cli("quantize", folder, "-o", out, *typed)
    assert again.exit_code == 2 and "is there and not empty" in again.output


def test_eval_prints_a_table_and_json(cli: Callable[..., Result], folder: Path, prose: Path) -> None:
    typed = ("eval", folder, "--data", prose, "--tokens", 60, "--window", 30, "--lowering", "eager")
    shown = cli(*typed, "--passes", "int8_weights")
    assert shown.exit_code == 0, shown.output
    assert "without passes" in shown.stdout and "over 58 tokens" in shown.stdout
    found = json.loads(cli(*typed, "--passes", "none", "--json").stdout)
    assert found["tokens"] == 58 and math.isclose(found["ratio"], 1, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quantize", "smollm2-135m", "-o", "x", "--method", "gtpq"), "--method gtpq: there are"),
        (("quantize", "smollm2-135m", "-o", "x", "--bits", "5"), "gptq has 3 and 4"),
        (("quantize", "smollm2-135m", "-o", "x", "--group-size", "48"), "use 32, 64 or 128"),
        (("quantize", "smollm2-135m", "-o", "x", "--data", "/no/file"), "there is no such file"),
        (("eval", "smollm2-135m", "--data", "/no/file"), "there is no such file"),
        (("eval", "digits-dit"), "makes images"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    cli: Callable[..., Result], words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    got = cli(*words)
    assert got.exit_code == 2 and said in " ".join(got.output.split()), got.output


def test_text_that_is_too_short(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    got = cli("quantize", folder, "-o", tmp_path / "q", "--data", short, "--group-size", 32)
    assert got.exit_code == 2 and "one piece needs 512" in " ".join(got.output.split())
    assert not (tmp_path / "q").exists()
