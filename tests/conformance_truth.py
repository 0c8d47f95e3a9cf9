"""What is true of every family before any pass: does it build, run, how many attentions, does Dynamo capture it.

    python -m tests.conformance_truth            # the families that tests/data/truth.json lacks, or has only in part
    python -m tests.conformance_truth causal_lm/llama image/vit

Families run in child processes under a limit, because a capture that hangs or dies must not take the others along; a
child that lived goes on to the next family, since imports would otherwise be most of the time. The result is
tests/data/truth.json, sorted, one family a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from accelpass.models_zoo import tiny
from tests import attention_truth

LIMIT = 120  # seconds of processor time a family: the machine may be busy with other work
WALL_LIMIT = 900
WORKERS = 2
_FORK = multiprocessing.get_context("fork")
TRUTH = Path(__file__).parent / "data" / "truth.json"
PENDING = "capture: not tried yet"
# A compiled graph may reorder sums; more than this is another result.
TOLERANCE = 1e-3

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="KIND/NAME; all families if none is given")
    chosen = parser.parse_args(arguments).families
    torch.set_num_threads(1)
    _warm_up()

    rows = {row["kind"] + "/" + row["name"]: row for row in _read()}
    settled = {key for key, row in rows.items() if row["reason"] != PENDING}
    todo = [family for family in tiny.families() if (family.key in chosen if chosen else family.key not in settled)]
    for row in _all(todo):
        rows[row["kind"] + "/" + row["name"]] = row
        _write(rows)  # After each, so that an interrupted run goes on where it was.
        print(f"{row['kind']}/{row['name']}: {_summary(row)}", file=sys.stderr, flush=True)


def _warm_up() -> None:
    """Import here what every child would: transformers and Dynamo import most of themselves on first use."""
    from torch._dynamo.utils import counters

    for family in (tiny.Family("llama", "causal_lm"), tiny.Family("dit", "diffusion")):
        built = family.build()
        with torch.no_grad():
            _capture(built, _first(built.model(**built.kwargs)))
    torch._dynamo.reset()
    counters.clear()
    gc.freeze()  # A collection in a child would touch, and so copy, all that it shares with its parent.


class _Worker:
    """A child that examines one family after another, until it dies of one or is killed for taking too long."""

    def __init__(self) -> None:
        self._pipe, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.row: Row | None = None
        self._started = self._spent = 0.0

    def start(self, family: tiny.Family) -> None:
        self.row, self._started, self._spent = _blank(family), time.monotonic(), self._processor_time()
        self._pipe.send(family.key)

    def finished(self) -> bool:
        """True when the row is complete, which it also is when the family took the process along (see ``usable``)."""
        assert self.row is not None
        try:
            while self._pipe.poll():
                self.row.update(self._pipe.recv())
        except EOFError:
            self._process.join()
            return self._lost(f"process ended with {self._process.exitcode}")
        if "seconds" in self.row:
            return True
        if self._processor_time() - self._spent > LIMIT or time.monotonic() - self._started > WALL_LIMIT:
            self._process.kill()
            self._process.join()
            return self._lost(f"no answer within {LIMIT} s")
        return False

    def _processor_time(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def _lost(self, reason: str) -> bool:
        assert self.row is not None
        self.row.setdefault("seconds", round(time.monotonic() - self._started, 1))
        self.row["reason"] = self.row["reason"] or reason
        return True

    @property
    def usable(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _all(todo: list[tiny.Family]) -> Iterator[Row]:
    """Yield each family's row as it ends, WORKERS at a time."""
    waiting = list(reversed(todo))
    busy: list[_Worker] = []
    idle: list[_Worker] = []
    while waiting or busy:
        while waiting and len(busy) < WORKERS:
            worker = idle.pop() if idle else _Worker()
            worker.start(waiting.pop())
            busy.append(worker)
        time.sleep(0.2)
        for worker in [worker for worker in busy if worker.finished()]:
            busy.remove(worker)
            if worker.row is not None:
                yield worker.row
            if worker.usable:
                idle.append(worker)
    for worker in idle:
        worker.stop()


def _serve(pipe: Connection) -> None:
    from torch._dynamo.utils import counters

    while True:
        _examine(tiny.family(pipe.recv()), pipe)
        torch._dynamo.reset()
        counters.clear()


def _blank(family: tiny.Family) -> Row:
    return {
        "name": family.name,
        "kind": family.kind,
        "builds": False,
        "runs": False,
        "attentions": None,
        "modules": None,
        "graphs": None,
        "same": None,
        "reason": None,
    }


def _examine(family: tiny.Family, send: Connection) -> None:
    """In the child: say each fact as soon as it is known, so that a later crash does not lose it."""
    started = time.monotonic()
    stage = "build"
    try:
        built = family.build()
        send.send({"builds": True})
        stage = "run"
        with torch.no_grad():
            eager = _first(built.model(**built.kwargs))
        send.send({"runs": True})
        stage = "count"
        counts = {
            "attentions": attention_truth.count_attentions(built.model, built.kwargs),
            "modules": attention_truth.count_modules(built.model, built.kwargs),
        }
        send.send(counts)
        stage = "capture"
        send.send(_capture(built, eager))
    except Exception as error:
        send.send({"reason": f"{stage}: {_short(error)}"})
    send.send({"seconds": round(time.monotonic() - started, 1)})


def _capture(built: tiny.Build, eager: torch.Tensor) -> Row:
    from torch._dynamo.backends.debugging import aot_eager
    from torch._dynamo.utils import counters

    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    compiled = torch.compile(built.model, backend=backend)
    with torch.no_grad():
        out = _first(compiled(**built.kwargs))
    row: Row = {"graphs": graphs, "same": bool(torch.allclose(out, eager, rtol=TOLERANCE, atol=TOLERANCE))}
    if breaks := list(counters["graph_break"]):
        row["reason"] = "graph break: " + _clean(breaks[0])
    elif not row["same"]:
        row["reason"] = f"differs from eager by {(out - eager).abs().max():.2g}"
    return row


def _first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _short(error: BaseException) -> str:
    return _clean(f"{type(error).__name__}: {error}")


def _clean(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."


def _summary(row: Row) -> str:
    return f"{row['attentions']} attentions, {row['graphs']} graphs, {row['seconds']} s, {row['reason'] or 'ok'}"


def _read() -> list[Row]:
    return json.loads(TRUTH.read_text()) if TRUTH.is_file() else []


def _write(rows: dict[str, Row]) -> None:
    """One family a line: a change in one shows as one line."""
    lines = [json.dumps(rows[key]) for key in sorted(rows)]
    TRUTH.parent.mkdir(exist_ok=True)
    TRUTH.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
