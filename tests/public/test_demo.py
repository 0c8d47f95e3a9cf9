"""The demo shows where it is and how long it will take, and its first answer before the baseline is compiled."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from accelpass.api.quality.compare import compare, parts
from accelpass.cli import main as cli
from accelpass.cli.pace import Pace, paced
from tests.public.conftest import tiny_llama


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_that_is_left_follows_what_is_over() -> None:
    clock = Clock()
    pace = Pace({"load": 5, "compile": 20, "run": 10}, clock)
    pace.enter("load")
    assert (pace.elapsed, pace.total) == (0, 35) and str(pace) == "0:00 of about 0:35"
    clock.now = 10
    assert pace.total == 10 + 20 + 10, "a part that takes longer than expected is about to end"
    pace.enter("compile")
    assert pace.total == 10 + 2 * (20 + 10), "this machine takes twice as long"
    clock.now = 100
    pace.enter("something else")
    assert pace.total == pytest.approx(100 + 100 / 25 * 10)
    clock.now = 101
    pace.enter("run")
    clock.now = 165
    assert pace.elapsed == pace.total == 165 and str(pace) == "2:45 of about 2:45"


class Waited(io.StringIO):
    """Text that tells when a number of lines is there."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines, self.there = lines, threading.Event()

    def write(self, text: str) -> int:
        done = super().write(text)
        if self.getvalue().count("\n") >= self.lines:
            self.there.set()
        return done


def test_a_log_has_a_line_for_each_part_and_a_heartbeat() -> None:
    out = Waited(4)
    with paced({"compile": 60, "run": 5}, Console(file=out, width=100), heartbeat=0.01) as enter:
        enter("compile")
        assert out.there.wait(30), "the compiler says nothing, and lines come all the same"
    lines = out.getvalue().splitlines()
    assert set(lines[:4]) == {"compile (0:00 of about 1:05)"}


def test_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with paced({"compile": 60, "run": 5}, console) as enter:
        enter("compile")
        console.print("an answer")
        enter("run")
    assert "compile" in out.getvalue() and "of about" in out.getvalue() and "━" in out.getvalue()
    assert "an answer" in out.getvalue()


class Letters:
    """A tokenizer of one letter for each token."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(c) % 64 for c in text]])}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_accelpass_answers_before_the_baseline_is_compiled() -> None:
    said: list[str] = []
    model = tiny_llama(1)
    result = compare(
        model,
        Letters(),
        "hello",
        {"passes": ["int8_weights"], "lowering": "eager"},
        4,
        rounds=2,
        on_step=said.append,
        on_answer=lambda name, answer: said.append(f"{name} says {answer}"),
    )
    expected = list(parts("eager", 2, 1))
    first = said.index(f"accelpass says {result.answers['accelpass']}")
    assert said[:first] + said[first + 1 :] == expected, "what is shown is what was expected, in that order"
    assert said[first + 1] == "eager: compiling the prompt's graph"
    assert [len(c.runs) for c in (result.baseline, result.candidate)] == [2, 2]


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load", lambda *_, **__: (tiny_llama(1), Letters()))
    words = ["demo", "--quick", "--lowering", "eager", "--max-new-tokens", "3", "--html", str(tmp_path / "r.html")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.stderr
    shown = done.stderr
    order = ["Loading", "accelpass: compiling the prompt", "accelpass says", "eager: compiling the prompt", "3 of 3"]
    places = [shown.index(part) for part in order]
    assert places == sorted(places) and "of about" in shown
    lines = done.stdout.splitlines()
    assert lines[0].startswith("--quick") and lines[1].startswith("Asked: ")
    assert any("tokens/s" in line for line in lines) and any("weights read per token" in line for line in lines)
    assert (tmp_path / "r.html").exists()
