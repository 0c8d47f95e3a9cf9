"""A sample of `make peers`, and that its comparison sees what it is there to see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.marked_section import replace_section
from tests.peers import model_samples, torch_samples
from tests.peers.__main__ import markdown
from tests.peers.case import Row, Sample, add, differs, isolated, judge

OPERATORS = ("addmm", "nn.functional.layer_norm", "nn.functional.scaled_dot_product_attention", "index_add", "cat")
MODULES = ("nn.Linear", "nn.MultiheadAttention")


def _measured(key: str) -> Row:
    made: Row = {"key": key}
    ops, modules = torch_samples.databases()
    kind, name = key.split("/", 1)
    if kind == "operator":
        torch_samples.operator_row(next(o for o in ops if o.name == name), 2, False)(made)
    else:
        torch_samples.module_row(next(m for m in modules if m.name == name), 2, False)(made)
    return made


@pytest.mark.parametrize("key", [*(f"operator/{n}" for n in OPERATORS), *(f"module/{n}" for n in MODULES)])
def test_samples_of_torch(key: str) -> None:
    row = _measured(key)
    assert row["same"] >= 4 and "wrong" not in row, row


@pytest.mark.slow
def test_generation() -> None:
    row: Row = {}
    model_samples.generation_row("llama", ("left padding",))(row)
    assert row == {"same": 2}


def test_differences_are_seen() -> None:
    x = torch.ones(3)
    assert not differs((x, 2), (x, 2))
    assert "differs by" in differs(x, x * 1.01)
    assert differs(x, x.double()) and differs(x, x[:2]) and differs((x,), [x])
    assert differs(x.int(), x.int() + 1) == "other integers"
    assert differs(x, x / 0) and differs((x, 2), (x, 3))
    assert "answers" in differs(x, ValueError("no"))
    assert not differs(ValueError("one"), TypeError("other")), "both may raise"


def test_verdicts_are_counted_and_children_cannot_take_the_rest_along() -> None:
    row: Row = {}
    for found in ({"default": "", "int8_weights": "differs by 1"}, {"default": "-"}, {}):
        add(row, "sample", found)
    assert row == {
        "same": 1,
        "wrong": 1,
        "incomparable": 1,
        "unusable": 1,
        "why": ["sample, int8_weights: differs by 1"],
    }
    assert "crash" in isolated("x", lambda row: [][0] if row is None else os._exit(3), 5)["failed"]
    page = markdown([{"key": "operator/a", **row}, {"key": "module/b", "failed": "no answer"}], 2)
    assert "| 1 | 1 | 1 | 0 | 1 | 0 |" in page and "operator/a: 1 of 2" in page and "module/b: no answer" in page


def test_what_no_compiler_answers_is_incomparable() -> None:
    class Coin(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if torch.compiler.is_compiling() else x

    assert judge(Sample("coin", Coin(), (torch.ones(2),)), None) == {"default": "-", "int8_weights": "-"}


def test_what_never_reaches_the_backend_is_no_agreement() -> None:
    class Skipped(nn.Module):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    found = judge(Sample("skipped", Skipped(), (torch.ones(2),)), None)
    assert found == {"default": "eager", "int8_weights": "eager"}


def test_a_section_is_written_and_the_rest_left(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n")
    for text in ("one", "two"):
        replace_section(page, "mine", text)
        replace_section(page, "yours", "other")
    assert page.read_text().startswith("# Before\n\n<!-- mine: start -->\n\ntwo\n")
    assert page.read_text().count("<!--") == 4 and "one" not in page.read_text()
