"""Compiles every architecture family with accelpass and compares it with what the family really executes.

    python -m tests.conformance                                    # resumes what an interrupted run left
    python -m tests.conformance --families llama,image/vit
    python -m tests.conformance --write docs/conformance.md

Each family runs in a forked child under a time limit, through the backend with no options. The number of attentions
found is compared with an eager forward watched at torch's function calls, the outputs with eager. The column "of specs"
is the difference when every attention is computed from its spec instead of the model's operators.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from accelpass.backends import backend
from accelpass.ir import attention
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.verify import signature, verify
from accelpass.models_zoo import tiny
from tests.attention_truth import count_attentions
from tests.marked_section import replace_section
from tests.resumable import Notes, bar

Row = dict[str, Any]
TOLERANCE = 1e-3  # relative; two compilations of one model may order sums differently
LIMIT = 180  # seconds a family
NOTES = Notes("conformance")

EXCEPTIONS: dict[str, str] = {
    "image/dinat": "not built: needs the natten package, which has no CPU wheel",
    "causal_lm/jamba": "the selective scan cannot be retraced, so the graph is compiled as it is",
    "causal_lm/zamba": "the selective scan cannot be retraced, so the graph is compiled as it is",
    "masked_lm/longformer": "scores of overlapping chunks are skewed into a band: no product of queries and keys",
    "image/siglip": "eager computes the pooling head's attention and drops it; the graph does not hold it",
    "image/shieldgemma2": "its SigLIP tower computes the pooling head's attention and drops it",
}
"""Families whose counts differ, and why."""


class Compiler:
    """Compiles a model and says how many attentions were found."""

    def __init__(self, lowering: str) -> None:
        self.lowering = lowering
        self.graphs = self.found = 0
        self.spec_error = 0.0
        self.notes: list[str] = []

    def compile(self, model: torch.nn.Module) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(model, backend=self._backend, dynamic=False)

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled = backend(gm, inputs, options={"lowering": self.lowering})
        if compiled.report.note:
            self.notes.append(compiled.report.note)
        found = compiled.report.before.found.get("attention", 0)
        check = self._composed(gm, inputs) if compiled.binder is not None else None

        def run(*args: Any) -> Any:
            if check is not None:
                check(*args)
            # A graph for a block that occurs four times is compiled once and executes four attentions.
            self.found += found
            return compiled(*args)

        return run

    def _composed(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., None]:
        """What runs the graph twice, once computed from the specs alone, and notes the difference."""
        one, two = from_dynamo(gm, inputs), from_dynamo(gm, inputs)
        self.notes += [f"{miss.path or miss.node}: {miss.why}" for miss in attention.near_misses(one)]
        for found in attention.insert(two):
            assert found.node is not None
            spec = attention.spec_of(found.node).edited(by="conformance", select=attention.All())
            attention.set_spec(found.node, spec)
        before = signature(two)
        attention.lower(two)
        verify(two, before, "lower composed")
        names = [n.name for n in placeholders(one.gm)]
        written = {i for i, name in enumerate(names) if name in before.mutated}

        def check(*args: Any) -> None:
            answers = []
            for program in (one, two):
                given = [a.clone() if i in written else a for i, a in enumerate(args)]
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    answers.append(program.gm(*given))
            self.spec_error = max(self.spec_error, _error(*answers))

        return check


def measure(family: tiny.Family, lowering: str) -> Row:
    """One row of the table."""
    row: Row = {
        "key": family.key,
        "kind": family.kind,
        "graphs": 0,
        "true": None,
        "found": 0,
        "error": None,
        "note": "",
    }
    build = family.build()
    with torch.no_grad():
        row["true"] = count_attentions(build.model, build.kwargs)
        torch.manual_seed(0)
        want = build.model(**build.kwargs)
        compiler = Compiler(lowering)
        compiled = compiler.compile(build.model)
        torch.manual_seed(0)
        got = compiled(**build.kwargs)
    row.update(
        graphs=compiler.graphs,
        found=compiler.found,
        spec_error=compiler.spec_error,
        error=_error(want, got),
    )
    row["note"] = "; ".join(f"{n} ({c})" if c > 1 else n for n, c in Counter(compiler.notes).items())
    return row


def _error(want: Any, got: Any) -> float:
    """The largest difference relative to the largest value, over all float outputs."""
    worst = 0.0
    pairs = zip(_tensors(want), _tensors(got), strict=True)
    for a, b in pairs:
        if a.is_floating_point() and a.numel():
            a, b = a.double(), b.double()
            worst = max(worst, float(torch.nan_to_num(a - b).abs().max() / a.nan_to_num().abs().max().clamp_min(1e-12)))
    return worst


def _tensors(found: Any) -> list[torch.Tensor]:
    if hasattr(found, "items"):
        found = dict(found.items())
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def rows(families: Iterable[tiny.Family], lowering: str, limit: int) -> Iterable[Row]:
    """Measure each family in a child of its own; a crash or a hang is a row with a note."""
    for family in families:
        empty: Row = {"key": family.key, "kind": family.kind, "graphs": 0, "true": None, "found": 0, "error": None}
        if family.unbuildable:
            yield {**empty, "note": f"not built: {family.unbuildable}", "seconds": 0.0}
            continue
        start = time.monotonic()
        answer, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answer)
            signal.alarm(limit)
            try:
                row = measure(family, lowering)
            except BaseException as error:  # whatever it is, the parent reports it
                last = traceback.extract_tb(error.__traceback__)[-1]
                text = str(error).strip().splitlines()
                message = (
                    f"{type(error).__name__}: {text[0] if text else ''} ({Path(last.filename).name}:{last.lineno})"
                )
                row = {**empty, "note": f"FAILED {message}"}
            with suppress(BrokenPipeError), os.fdopen(write, "w") as pipe:
                pipe.write(json.dumps(row))
            os._exit(0)
        os.close(write)
        with os.fdopen(answer) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        row = json.loads(text) if text else {**empty, "note": f"FAILED no answer within {limit} s"}
        yield {**row, "seconds": round(time.monotonic() - start, 1)}


def is_right(row: Row) -> bool:
    """Same count, same outputs."""
    errors = (row["error"], row.get("spec_error"))
    return row["true"] == row["found"] and all(error is not None and error <= TOLERANCE for error in errors)


def table(measured: list[Row]) -> Table:
    """The rows, families that differ in red."""
    shown = Table("family", "graphs", "true", "found", "max rel. error", "of specs", "note")
    for row in measured:
        errors = ["" if e is None else f"{e:.1e}" for e in (row["error"], row.get("spec_error"))]
        note = EXCEPTIONS.get(row["key"], "") or row["note"]
        style = None if is_right(row) or row["true"] is None else "red"
        cells = [row["key"], row["graphs"], "" if row["true"] is None else row["true"], row["found"], *errors, note]
        shown.add_row(*map(str, cells), style=style)
    return shown


def summary(measured: list[Row]) -> str:
    """One line."""
    ran = [r for r in measured if r["true"] is not None and r["error"] is not None]
    true, found = sum(r["true"] for r in ran), sum(min(r["true"], r["found"]) for r in ran)
    wrong = sum(max(0, r["found"] - r["true"]) for r in ran)
    right = sum(map(is_right, ran))
    failed = [r["key"] for r in measured if r["note"].startswith("FAILED")]
    share = 100 * found / true if true else 0.0
    return (
        f"{len(ran)} families ran, {right} exactly right; {found} of {true} attentions found ({share:.1f} %), "
        f"{wrong} wrong; largest error {max((r['error'] for r in ran), default=0.0):.1e}, "
        f"of specs {max((r.get('spec_error') or 0.0 for r in ran), default=0.0):.1e}; {len(failed)} failed"
        + (f": {', '.join(failed)}" if failed else "")
    )


def markdown(measured: list[Row]) -> str:
    """The table for the documentation."""
    lines = ["# Attentions found, by architecture family", "", summary(measured), ""]
    lines += ["| family | graphs | true | found | max rel. error | of specs | note |", "|---|---|---|---|---|---|---|"]
    for row in measured:
        errors = " | ".join("" if e is None else f"{e:.0e}" for e in (row["error"], row.get("spec_error")))
        note = EXCEPTIONS.get(row["key"], "" if is_right(row) else row["note"]).replace("|", "\\|")
        true = "" if row["true"] is None else row["true"]
        lines.append(f"| {row['key']} | {row['graphs']} | {true} | {row['found']} | {errors} | {note} |")
    return "\n".join(lines) + "\n"


def _warm_up() -> None:
    """Import here what every child would; a compilation imports most of Dynamo."""
    family = tiny.family("causal_lm/llama")
    for module in ("transformers.models.bert.modeling_bert", "diffusers.models.transformers"):
        __import__(module)
    measure(family, "eager")
    torch._dynamo.reset()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default="", help="comma separated names or KIND/NAME; all if none is given")
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds a family")
    parser.add_argument("--write", type=Path, help="a Markdown file for the result")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = {name for name in given.families.split(",") if name}
    every = tiny.families()
    unknown = chosen - {f.key for f in every} - {f.name for f in every}
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; see accelpass.models_zoo.tiny.families()")
    wanted = [f for f in every if not chosen or f.key in chosen or f.name in chosen]
    done: dict[str, Row] = {} if chosen else {row["key"]: row for row in NOTES.rows()}
    _warm_up()
    with bar("families", len(wanted), len(done)) as shown:
        for row in rows((f for f in wanted if f.key not in done), given.lowering, given.limit):
            done[row["key"]] = row
            NOTES.add(row)
            shown.advance(title=row["key"])
    measured = [done[f.key] for f in wanted]
    console = Console(width=160)
    console.print(table(measured))
    console.print(summary(measured), soft_wrap=True)
    if given.write:
        replace_section(given.write, "architecture families", markdown(measured))
    if not chosen:
        NOTES.end()
    wrong = (r for r in measured if not is_right(r) and not r["note"].startswith("not built"))
    return int(any(r["note"].startswith("FAILED") or r["key"] not in EXCEPTIONS for r in wrong))


if __name__ == "__main__":
    sys.exit(main())
