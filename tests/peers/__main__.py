"""Compiles what torch, transformers and diffusers test themselves with, and compares with eager.

    python -m tests.peers                             # resumes what an interrupted run left
    python -m tests.peers --only operator/linear,generation/llama
    python -m tests.peers --samples 2 --write docs/conformance.md

A sample that plain ``torch.compile(backend="aot_eager")`` does not answer as eager does cannot be compared, and is counted so.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import torch

from tests.marked_section import replace_section
from tests.peers import model_samples, torch_samples
from tests.peers.case import Row, isolated
from tests.resumable import Notes, bar

NOTES = Notes("peers")
LIMIT = 600  # seconds a row; generation compiles a graph for each of some lengths
KINDS = {
    "operator": "operators of torch (`op_db`)",
    "module": "modules of torch (`module_db`)",
    "generation": "generation with transformers",
    "denoiser": "transformers of diffusers",
}
COUNTED = ("same", "incomparable", "uncompiled", "wrong")


def markdown(rows: Iterable[Row], samples: int) -> str:
    """The section: a table by kind, and each failure."""
    rows = list(rows)
    lines = ["## Other projects' samples", ""]
    lines += [
        f"At most {samples} for each operator or module and dtype (float32, bfloat16, int64), compiled with the default options "
        "and with `int8_weights` (compared with eager on weights rounded alike), one operator in forty with Inductor as well. "
        "Every second sample has its further tensors as weights, every third is compiled for any size. "
        '"Not comparable": plain `torch.compile(backend="aot_eager")` fails or differs from eager, too. "Not compiled": Dynamo '
        "gave the backend no graph, so eager was compared with itself.",
        "",
        "| | rows | as eager | not comparable | not compiled | wrong | rows that did not end |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        mine = [r for r in rows if r["key"].startswith(f"{kind}/")]
        counts: Counter[str] = sum((Counter({c: r.get(c, 0) for c in COUNTED}) for r in mine), Counter())
        ended = sum("failed" in r for r in mine)
        lines.append(
            f"| {title} | {len([r for r in mine if 'unbuilt' not in r])} | {counts['same']} | {counts['incomparable']} | {counts['uncompiled']} "
            f"| {counts['wrong']} | {ended} |"
        )
    if unbuilt := [r["key"].split("/")[1] for r in rows if "unbuilt" in r]:
        lines += ["", "Not measured, as no tiny one could be built: " + ", ".join(sorted(unbuilt)) + "."]
    bad = [r for r in rows if r.get("wrong") or "failed" in r]
    if bad:
        lines += ["", "Not as eager:", ""]
    for r in bad:
        why = r.get("failed") or f"{r['wrong']} of {r['wrong'] + r.get('same', 0)}: {r['why'][0]}"
        lines.append(f"- {r['key']}: {' '.join(why.split())[:160]}".replace("<", "&lt;"))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="comma separated keys, or kinds such as generation")
    parser.add_argument("--samples", type=int, default=torch_samples.SAMPLES, help="of each dtype of an operator")
    parser.add_argument("--write", type=Path, help="a Markdown file whose section on this is written anew")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # what a sample raises is in its row
    every = {**model_samples.rows(), **torch_samples.rows(given.samples)}
    chosen = set(filter(None, given.only.split(",")))
    if unknown := chosen - set(every) - set(KINDS):
        parser.error(f"no {', '.join(sorted(unknown))}; a key is KIND/NAME with KIND one of {', '.join(KINDS)}")
    wanted = [k for k in every if not chosen or k in chosen or k.split("/")[0] in chosen]
    done: dict[str, Row] = {r["key"]: r for r in NOTES.rows() if r["samples"] == given.samples and r["key"] in wanted}
    with (
        bar("samples", len(wanted), len(done)) as shown,
        patch("torch._dynamo.guards.profile_guard_manager", lambda *a: 0.0),
    ):
        torch.compile(lambda x: x + 1, backend="accelpass", options={"lowering": "aten"})(torch.ones(2))  # imports
        if any(k.startswith(("generation/", "denoiser/")) for k in wanted):
            model_samples.warm_up()
        for key in (k for k in wanted if k not in done):
            done[key] = {**isolated(key, every[key], LIMIT), "samples": given.samples}
            NOTES.add(done[key])
            for why in [*done[key].get("why", ())[:3], *filter(None, [done[key].get("failed")])]:
                shown.say(f"{key}: {why}")
            shown.advance(title=key)
    text = markdown((done[k] for k in wanted), given.samples)
    print(text)
    if given.write:
        replace_section(given.write, "other projects", text)
    return int(any(r.get("wrong") or "failed" in r for r in done.values()))


if __name__ == "__main__":
    sys.exit(main())
