"""Compares random models under random options with eager, and makes what fails small.

    python -m tests.fuzz --programs 10000 --seed 0     # goes on where an interrupted run stopped
    python -m tests.fuzz --programs 200 --without autocast,empty
    python -m tests.fuzz --programs 10000 --write docs/conformance.md

Each program is compiled with two settings that share one trace of Dynamo. A failure is shrunk and saved in
tests/fuzz/found/; those of one kind are saved once.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.fuzz import found, settings
from tests.fuzz.grammar import FEATURES, program
from tests.fuzz.judge import collect, judge
from tests.fuzz.shrink import fails, kind_of, shrunk
from tests.marked_section import replace_section
from tests.resumable import DATA, Notes, bar

NOTES = Notes("fuzz")
RUNS = DATA / "fuzz_runs.json"
"""What runs of several seeds came to, each with the code of its day."""
SETTINGS = 2  # a program
CHUNK = 20  # programs between two notes of what is done
INDUCTOR = 200  # every so many programs one goes through Inductor


@dataclass
class Tally:
    """What came of some programs."""

    programs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    sites: int = 0
    seconds: float = 0.0
    wrong: list[tuple[int, int, str]] = field(default_factory=list)
    """Of each failure the program's number, which of its settings, and what differs."""

    def add(self, other: Tally) -> None:
        self.programs += other.programs
        self.counts += other.counts
        self.sites += other.sites
        self.seconds += other.seconds
        self.wrong += other.wrong


def options_of(number: int) -> list[settings.Options]:
    """The settings of a program."""
    rng = random.Random(number)
    if number % INDUCTOR == 7:
        return [settings.draw(rng, inductor=1.0)]
    return [settings.draw(rng) for _ in range(SETTINGS)]


def measure(numbers: Sequence[int], without: frozenset[str] = frozenset()) -> Tally:
    """Run the programs of these numbers."""
    tally, start = Tally(), time.monotonic()
    collect()
    # Dynamo times its guards on emptied processor caches, which is a tenth of the time of a program this small.
    with patch("torch._dynamo.guards.profile_guard_manager", lambda *given: 0.0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            made, options = program(number, without), options_of(number)
            # One in ten goes the way that a user goes, alone.
            groups = [[o] for o in options] if number % 10 == 0 else [options]
            verdicts = [v for group in groups for v in judge(made, group)]
            for index, verdict in enumerate(verdicts):
                tally.counts[verdict.status] += 1
                tally.sites += verdict.sites
                if verdict.status == "wrong":
                    tally.wrong.append((number, index, verdict.why))
            tally.programs += 1
    tally.seconds = time.monotonic() - start
    return tally


def _measured(chunks: Sequence[Sequence[int]], without: frozenset[str], jobs: int) -> Iterator[Tally]:
    if jobs == 1:
        yield from (measure(c, without) for c in chunks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(measure, chunks, [without] * len(chunks))


def save_new(wrong: Sequence[tuple[int, int, str]], known: set[str], without: frozenset[str]) -> list[str]:
    """Shrink and save the failures whose kind is not in ``known``; returns what is to be said of them."""
    said = []
    for number, index, why in wrong:
        kind = kind_of(why)
        if kind in known:
            continue
        known.add(kind)
        case = (program(number, without), options_of(number)[index])
        if not fails(case, kind):
            said.append(f"program {number}: {why}\n  only beside another setting: {options_of(number)}")
            continue
        small = shrunk(case, kind)
        verdict = fails(small, kind)
        assert verdict is not None
        said.append(f"{found.save(*small, verdict)}: {verdict.why}")
    return said


def summary(tally: Tally, seed: int, without: Sequence[str] = ()) -> str:
    counts = tally.counts
    left_out = f" without {', '.join(sorted(without))}" if without else ""
    return (
        f"{tally.programs} programs from seed {seed}{left_out}, {counts.total()} compilations compared with eager "
        f"({tally.sites} sites rewritten): {counts['same']} the same, {counts['refused']} refused by name, "
        f"{counts['incomparable']} where plain torch.compile differs from eager too, {counts['wrong']} wrong "
        f"({len({kind_of(w) for _, _, w in tally.wrong})} kinds)"
    )


def section(tally: Tally, seed: int, without: Sequence[str]) -> str:
    """The documentation's section: this run beside those of other seeds, which are kept in :data:`RUNS`."""
    runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    runs[f"{seed} {' '.join(without)}".strip()] = {
        "programs": tally.programs,
        "compilations": tally.counts.total(),
        "sites": tally.sites,
        **{status: tally.counts[status] for status in ("same", "refused", "incomparable", "wrong")},
        "told": summary(tally, seed, without),
    }
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    total = {key: sum(run[key] for run in runs.values()) for key in ("programs", "compilations", "wrong")}
    lines = [
        "## Random programs",
        "",
        f"{total['programs']} programs in {total['compilations']} compilations, {total['wrong']} wrong:",
        "",
    ]
    return "\n".join([*lines, *(f"- {run['told']}." for run in runs.values())]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes")
    parser.add_argument("--without", default="", help=f"comma separated parts of the grammar: {', '.join(FEATURES)}")
    parser.add_argument("--write", type=Path, help="a Markdown file whose section on random programs is written anew")
    given = parser.parse_args(arguments)
    without = frozenset(filter(None, given.without.split(",")))
    if unknown := without.difference(FEATURES):
        parser.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(FEATURES)}")
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # both may raise: the comparison says what did
    run: dict[str, Any] = {"seed": given.seed, "without": sorted(without)}
    tally = Tally()
    for held in NOTES.rows():
        if held["run"] == run and tally.programs < given.programs:
            wrong = [(a, b, c) for a, b, c in held["wrong"]]
            tally.add(Tally(held["programs"], Counter(held["counts"]), held["sites"], held["seconds"], wrong))
    for failure in list(tally.wrong):  # what failed before an interruption may have been mended since
        number, index, _ = failure
        if (verdict := judge(program(number, without), [options_of(number)[index]])[0]).status != "wrong":
            tally.wrong.remove(failure)
            tally.counts += Counter({verdict.status: 1})
            tally.counts["wrong"] -= 1
    known = {kind_of(why) for _, _, why in tally.wrong}
    first = given.seed * 1_000_000
    numbers = range(first + tally.programs, first + given.programs)
    chunks = [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]
    with bar("programs", given.programs, tally.programs) as shown:
        for part in _measured(chunks, without, given.jobs):
            tally.add(part)
            shown.advance(part.programs, f"programs, {tally.counts['wrong']} wrong")
            NOTES.add({"run": run, **vars(part)})
            for said in save_new(part.wrong, known, without):
                shown.say(said)
    told = summary(tally, given.seed, run["without"])
    print(f"{told}; {tally.programs / max(tally.seconds, 1e-9):.1f} programs/s of one process")
    if given.write:
        replace_section(given.write, "random programs", section(tally, given.seed, run["without"]))
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
