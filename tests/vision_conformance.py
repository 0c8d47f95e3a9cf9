"""Compiles every family of vision-language models and says what is found of how it sees, and which pass of visual tokens takes it.

    python -m tests.vision_conformance                          # some minutes; resumes what an interrupted run left
    python -m tests.vision_conformance --models LLaVA,Qwen2-VL
    python -m tests.vision_conformance --write docs/conformance.md

Small random builds of the installed transformers, a text with images each. What is found is held against what the build has: the
blocks of its tower, and as many places in the text as features enter it. Outputs of the model without passes are held against eager.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

import accelpass
from accelpass.backends import backend
from accelpass.ir import attention
from accelpass.ir.analyses.structure.vision import Entry, Tower, vision
from accelpass.ir.core.capture import NotCanonical, from_dynamo
from accelpass.ir.core.graph import value
from accelpass.testing.trial import fresh
from tests import vision_models
from tests.marked_section import replace_section
from tests.resumable import Notes, bar
from tests.small_models import relative_error

Row = dict[str, Any]
SECTION = "vision-language models"
TOLERANCE = 1e-4
NOTES = Notes("vision_conformance")
PASSES: dict[str, dict[str, Any]] = {
    "tome": {"merge": 2},
    "visionzip": {"keep": 0.5},
    "hired": {"keep": 0.5},
    "flowcut": {"keep": 0.5},
    "stc": {"keep": 0.5},
    "fastv": {"layer": 1, "keep": 0.5},
    "flowcut_text": {"layer": 1, "keep": 0.5},
    "yopo": {"layer": 2, "window": 3, "first": 0},
}
"""At options at which they work on models as small as these."""
CAPACITY = 128
EXCEPTIONS: dict[str, str] = {}
"""Models of which something is not found, and why."""


class Watched:
    """Compiles a model without passes, and keeps what is found in its graphs."""

    def __init__(self) -> None:
        self.graphs = 0
        self.towers: list[Tower] = []
        self.entries: list[Entry] = []
        self.missed: dict[str, str] = {}

    def compile(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        try:
            program = from_dynamo(gm, inputs)
            attention.insert(program)
        except NotCanonical as cause:
            self.missed[f"graph {self.graphs}"] = f"not canonicalised: {cause}"
        else:
            found = program.analysis(vision)
            self.towers += found.towers
            self.entries += found.entries
            self.missed |= found.missed
        return backend(gm, inputs, options={"lowering": "eager", "passes": []})


def measure(name: str, passes: Sequence[str] = tuple(PASSES)) -> Row:
    """One row: what is found, and what each pass does or why it does nothing."""
    seen, watched = vision_models.build(name), Watched()
    with torch.no_grad():
        want = seen.model(**seen.given).logits
        fresh()
        accelpass.one_graph(seen.model)
        got = torch.compile(seen.model, backend=watched.compile, dynamic=False)(**seen.given).logits
    towers = watched.towers
    row: Row = {
        "model": name,
        "graphs": watched.graphs,
        "blocks": [len(t.blocks) for t in towers],
        "true_blocks": seen.blocks,
        "class_token": bool(towers and towers[0].first),
        "grid": list(map(int, towers[0].grid)) if towers and towers[0].grid else None,
        "enters": [f"by {e.how}" + ("" if e.tower else ", from another graph") for e in watched.entries],
        "visual": [value(e.features).numel() // value(e.node).shape[-1] for e in watched.entries],
        "true_visual": seen.visual,
        "missed": watched.missed,
        "error": relative_error(got, want),
        "took": {},
        "skipped": {},
    }
    row["visual"] = [int(n) if isinstance(n, int) or n.node.has_hint() else None for n in row["visual"]]
    for each in passes:
        took, skipped = tried(name, each)
        if took:
            row["took"][each] = took
        else:
            row["skipped"][each] = skipped
    return row


def tried(name: str, each: str) -> tuple[str, str]:
    """What a pass does to a model, and what it says it does not; with a cache if it does nothing without."""
    without = tried_so(name, each, False)
    return without if without[0] else tried_so(name, each, True)


def tried_so(name: str, each: str, with_cache: bool) -> tuple[str, str]:
    """The same, called as ``generate`` calls it, with a cache, or without one."""
    fresh()
    seen = vision_models.build(name)
    with torch.no_grad():
        accelpass.one_graph(seen.model)
        options = {"lowering": "eager", "passes": [{"name": each, **PASSES[each]}]}
        fast = torch.compile(seen.model, backend="accelpass", options=options, dynamic=False)
        cache = {"use_cache": True, "past_key_values": accelpass.KVCache(seen.model, CAPACITY)} if with_cache else {}
        made = fast(**seen.given | cache).logits
    assert bool(made.isfinite().all()), f"{name}, {each}: not finite"
    report = accelpass.explain(fast)
    if each not in report.passes:  # no graph was canonicalised
        return "", "; ".join(n.partition(": ")[2] for n in report.notes if "not canonicalised" in n)
    done = report.passes[each]
    took = "; ".join(dict.fromkeys(d.what for d in done.took.values()))
    whys = dict.fromkeys(done.skipped.values())  # of several graphs; what another says too is left out
    return took, "; ".join(why for why in whys if not any(why in other for other in whys if other != why))


def is_right(row: Row) -> bool:
    """The tower, and the places where its features enter, are those that the model has; outputs are eager's."""
    there = row["true_blocks"] in row["blocks"] and row["true_visual"] in row["visual"]
    return there and row["error"] <= TOLERANCE


def cells(row: Row) -> list[str]:
    """Of the table of what is found."""
    true = row["true_blocks"]
    other = ", ".join(f"{n} blocks, not {true}" for n in row["blocks"]) or "not found"
    tower = f"{true} blocks" if true in row["blocks"] else other
    grid = "x".join(map(str, row["grid"])) if row["grid"] else ""
    visual = next((f"{n} of {row['true_visual']}" for n in row["visual"] if n == row["true_visual"]), None)
    if visual is None:
        visual = "; ".join("told at run time" if n is None else f"{n} of {row['true_visual']}" for n in row["visual"])
    enters = "; ".join(dict.fromkeys(row["enters"])) or "not found"
    front = "yes" if row["class_token"] else "no" if row["blocks"] else ""
    return [row["model"], str(row["graphs"]), tower, front, grid, enters, visual or "none", f"{row['error']:.0e}"]


HEAD = [
    "model",
    "graphs",
    "tower",
    "class token",
    "patches",
    "features enter the text",
    "visual tokens",
    "max rel. error",
]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why passes stand aside: a line for each reason, with the models, and the passes that say it of them."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for each, why in row["skipped"].items():
            models.setdefault((each, why), []).append(row["model"])
    passes: dict[tuple[str, str], list[str]] = {}
    for (each, why), names in models.items():
        passes.setdefault((", ".join(names), why), []).append(f"`{each}`")
    return [f"{names}, {', '.join(given)}: {why}" for (names, why), given in sorted(passes.items())]


def markdown(rows: Sequence[Row]) -> str:
    """The section of the documentation."""
    line = lambda parts: "| " + " | ".join(p.replace("|", "\\|") for p in parts) + " |"  # noqa: E731
    right, taken = sum(map(is_right, rows)), sum(len(row["took"]) for row in rows)
    names = [p for p in PASSES if any(p in r["took"] or p in r["skipped"] for r in rows)]
    lines = [
        "## Vision-language models",
        f"Small builds of transformers, with tower and text in one graph where that can be (`accelpass.one_graph`). Of {len(rows)} models "
        f"the tower and the places of its features were found in {right}; of {len(rows) * len(names)} pairs of a model and a pass {taken} "
        "are taken, without a cache or with an `accelpass.KVCache`. The others run as they were, and say why.",
        "\n".join([line(HEAD), "|" + "---|" * len(HEAD), *(line(cells(row)) for row in rows)]),
    ]
    if why := [f"- {row['model']}: {EXCEPTIONS[row['model']]}" for row in rows if row["model"] in EXCEPTIONS]:
        lines += ["What is not found:", "\n".join(why)]
    told = [[row["model"], *("yes" if p in row["took"] else "no" for p in names)] for row in rows]
    lines += [
        "Which passes take them:",
        "\n".join([line(["model", *names]), "|" + "---|" * (1 + len(names)), *map(line, told)]),
    ]
    lines += ["Why the others stand aside:", "\n".join(f"- {said}" for said in reasons(rows))]
    return "\n\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="", help="comma separated; all if none is given")
    parser.add_argument("--write", type=Path, help="a Markdown file for the result")
    given = parser.parse_args(arguments)
    wanted = [n for n in given.models.split(",") if n] or list(vision_models.MODELS)
    if unknown := set(wanted) - set(vision_models.MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; known: {', '.join(vision_models.MODELS)}")
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    torch.set_num_threads(1)
    done: dict[str, Row] = {} if given.models else {row["model"]: row for row in NOTES.rows()}
    with bar("models", len(wanted), len(done)) as shown:
        for name in (n for n in wanted if n not in done):
            done[name] = measure(name)
            if not given.models:
                NOTES.add(done[name])
            shown.advance(title=name)
    rows = [done[name] for name in wanted]
    console, table = Console(width=180), Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row), style=None if is_right(row) else "red")
    console.print(table)
    for said in reasons(rows):
        console.print(said, markup=False)
    if given.write:
        replace_section(given.write, SECTION, markdown(rows))
    if not given.models:
        NOTES.end()
    return int(any(is_right(row) == (row["model"] in EXCEPTIONS) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
