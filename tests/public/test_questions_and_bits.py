"""Accuracy over questions with options, and the picture of bits by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import Result

import accelpass
from accelpass.api.calibration.bit_search import BitSearch
from accelpass.api.quality.question_accuracy import Question, evaluate_questions, read_questions
from accelpass.passes.core.plan import Plan
from accelpass.passes.quantization.mixed_precision import CHOICES
from accelpass.view.pictures.bits_picture import choices_of, figure
from tests.public.conftest import tiny_llama

ASKED = [
    Question("the sky is", ("blue", "made of cheese"), 0),
    Question("two and two", ("five", "is four", "x"), 1),
    Question("a dog", ("barks", "flies"), 1),
]


def letters(text: str, add_special_tokens: bool = True) -> Any:
    return SimpleNamespace(input_ids=[ord(c) % 128 for c in text])


def test_accuracy_is_what_its_words_say() -> None:
    torch._dynamo.reset()
    model = tiny_llama(1)
    found = evaluate_questions(model, letters, ASKED, {"passes": ["int8_weights"], "lowering": "eager"})
    picked: list[list[int]] = [[], []]
    for asked in ASKED:
        scores = []
        for option in asked.options:
            text = asked.question + " " + option
            ids = torch.tensor([letters(text).input_ids])
            with torch.no_grad():
                lost = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            scores.append(-float(lost[len(asked.question) - 1 :].sum()))
        picked[0].append(max(range(len(scores)), key=scores.__getitem__))
        picked[1].append(max(range(len(scores)), key=lambda i: scores[i] / len(asked.options[i])))
    shares = [sum(p == q.answer for p, q in zip(of, ASKED, strict=True)) / 3 for of in picked]
    assert [found.dense, found.dense_by_length] == pytest.approx(shares)
    assert found.questions == 3 and found.agreement == 1


def test_the_command_reads_them(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    file = tmp_path / "asked.jsonl"
    lines = [{"question": q.question, "options": q.options, "answer": q.options[q.answer]} for q in ASKED]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_questions(file) == ASKED
    shown = cli("eval", folder, "--questions", file, "--lowering", "eager", "--passes", "int8_weights")
    assert shown.exit_code == 0, shown.output
    assert "without passes" in shown.stdout and "of 3 questions" in shown.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: .* is needed"),
        ('{"question": "a", "options": ["b", "c"]}', "is needed"),
        ('{"question": "a", "options": ["b"], "answer": 0}', "two options or more"),
        ('{"question": "a", "options": ["b", "c"], "answer": 2}', "answer=2 is none of the 2 options"),
        ('{"question": "a", "options": ["b", "c"], "answer": "d"}', "answer='d' is none"),
        ("", "has no question"),
    ],
)
def test_questions_that_are_none(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(line)
    with pytest.raises(accelpass.OptionError, match=said):
        read_questions(file)


# --- bits by layer ---


def plan(**chosen: str) -> Plan:
    held = {
        f"mixed_precision/{p.replace('__', '.')}.weight/choice": torch.tensor(CHOICES.index(c))
        for p, c in chosen.items()
    }
    return Plan([], {}, held)


def test_bits_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = plan(
        model__layers__0__up="int3", model__layers__0__down="int8", model__layers__1__up="int8", lm_head="float"
    )
    assert choices_of(made) == {
        "model.layers.0.up": "int3", "model.layers.0.down": "int8", "model.layers.1.up": "int8", "lm_head": "float",
    }  # fmt: skip
    fig = figure(choices_of(made), "tiny")
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["layers.0", "layers.1", "(model)"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["up", "down", "lm_head"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["int3 (1)", "int8 (2)", "float (1)"]
    assert len(ax.patches) == 4 and len({p.get_facecolor() for p in ax.patches}) == 3
    found = BitSearch((4, 8), {"blocks.0.up": 4, "blocks.1.up": 8}, {}, {}, 6.0, 0.0)
    written = accelpass.draw_bits(found, tmp_path / "bits.png")
    assert written.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path: Path, cli: Callable[..., Result]) -> None:
    with pytest.raises(accelpass.AccelpassError, match="no choice of mixed_precision"):
        accelpass.draw_bits(Plan([], {}, {}), tmp_path / "bits.png")
    with pytest.raises(accelpass.AccelpassError, match=r"a picture is written as \.png"):
        accelpass.draw_bits(plan(up="int3"), tmp_path / "bits.pdf")
    got = cli("quantize", "smollm2-135m", "-o", tmp_path / "x", "--picture", tmp_path / "bits.png")
    assert got.exit_code == 2 and "gptq stores all weights alike" in " ".join(got.output.split())
