"""Debug mode: after each pass its graph is run against the one before it, and both are written out with their diff.

A folder holds what any number of processes write: ``run-TIME-PID/graph-001/`` has for each pass that changed something
``01-NAME.before.py``, ``.after.py`` and ``.html``; ``index.html`` lists all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.backends.debug import graph_diff
from accelpass.backends.debug.difference import largest_difference, shown
from accelpass.backends.debug.graph_code import inputs_said, listing
from accelpass.ir.core.derived import is_released
from accelpass.ir.core.graph import hint
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import PassError
from accelpass.ir.kv import holdings
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.torch_private import tree_leaves
from accelpass.passes.core.base import Record
from accelpass.passes.core.manager import Observer
from accelpass.passes.core.plan import write_text
from accelpass.passes.core.registry import registered

EXACT_TOLERANCE = 1e-3
"""Relative difference that float reordering may cause; a pass declared exact that exceeds it is refused."""
VARIABLE = "ACCELPASS_DEBUG"
FOLDER = "accelpass-debug"
"""Where graphs go if the environment variable does not say it."""
RECALLED = "the graph reads what earlier steps or calls have kept, which cannot be made up"


@dataclass
class _Row:
    """What the index says of one pass."""

    name: str
    took: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    difference: str = shown(None)
    total: str = shown(None)
    page: str = ""
    gone: int = 0
    new: int = 0


class Debugging:
    """Follows one graph through its passes.

    Args:
        inputs: of the call that the graph is compiled or exported for; None for a graph that is not to be run.
        variant: which of several graphs of one model this is, for people to read.
    """

    def __init__(self, program: Program, inputs: Sequence[Any] | None, variant: str = ""):
        root = Path(os.environ.get(VARIABLE) or FOLDER).expanduser()
        try:
            self.folder = _graph_folder(_run_folder(root.absolute(), os.getpid()))
        except OSError as cause:
            raise _unwritable(root, cause) from cause
        self.inputs, self.variant, self.rows = inputs, variant, list[_Row]()
        self.said = inputs_said(program)
        self.calls = sum(node.op == "call_function" for node in program.graph.nodes)
        self.unmeasured = ""
        self.first = self.last = self._outputs(program)
        self.code = listing(program)
        self._write("00-captured.py", f"{self._title('as captured')}\n{self.code}")
        self._index()

    @property
    def index(self) -> Path:
        """The page over all graphs of the folder."""
        return self.folder.parent.parent / "index.html"

    @property
    def note(self) -> str:
        """For the report: where to look, and what could not be measured."""
        missing = f"; differences were not measured: {self.unmeasured}" if self.unmeasured else ""
        name = self.folder.parent.name if self.variant else self._name  # variants of one graph have one note
        return f"debug: graphs and diffs of each pass are in {self.index} ({name}){missing}"

    @property
    def observer(self) -> Observer:
        return Observer(self.after)

    def after(self, program: Program, record: Record) -> None:
        """Measure and write what a pass did; its record gets the difference.

        Raises:
            PassError: the pass is declared exact and changed the outputs, or left a graph that does not run.
        """
        self._follow(program, record)
        p = registered().get(record.name)
        if p is not None and p.exact and record.difference is not None and not record.difference <= EXACT_TOLERANCE:
            raise PassError(
                f"debug: the pass {record.name!r} is declared exact and changed the outputs by {record.difference:.2e} "
                f"relative; sites: {', '.join(list(record.took)[:3])}; before and after: {self.index} ({self._name})"
            )

    def lowered(self, program: Program) -> None:
        """The same for the graph that the compiler is given."""
        self._follow(program, Record("lowering"))

    @property
    def _name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def _title(self, what: str) -> str:
        """A heading for people, as comments; diffs compare the code without it."""
        return "\n".join(
            f"# {line}" for line in (f"{self._name}, {what}", f"inputs: {self.said}", self.variant) if line
        )

    def _follow(self, program: Program, record: Record) -> None:
        outputs = self._outputs(program, record.name)
        if self.last is not None and outputs is not None:
            record.difference = largest_difference(self.last, outputs)
        total = None if self.first is None or outputs is None else largest_difference(self.first, outputs)
        row = _Row(record.name, len(record.took), dict(record.skipped), shown(record.difference), shown(total))
        code = listing(program)
        if code != self.code:
            page = f"{len(self.rows) + 1:02d}-{record.name}"
            about = [
                ("inputs", self.said),
                ("difference", f"{row.difference} by this pass, {row.total} so far"),
                ("sites", f"{row.took} taken, {len(row.skipped)} left alone"),
            ]
            if self.variant:
                about.append(("of", self.variant))
            if self.unmeasured:
                about.append(("not measured", self.unmeasured))
            row.page, (row.gone, row.new) = page, graph_diff.counted(self.code, code)
            done = {site: d.what for site, d in record.took.items()}
            title = f"{record.name}: {self._name}"
            self._write(f"{page}.html", graph_diff.diff_page(title, about, self.code, code, done))
            for side, text in (("before", self.code), ("after", code)):
                self._write(f"{page}.{side}.py", f"{self._title(f'{side} {record.name}')}\n{text}")
        self.rows.append(row)
        self.code, self.last = code, outputs
        self._index()

    def _outputs(self, program: Program, after: str = "") -> list[Tensor] | None:
        """What the model itself returns, or None if the graph cannot be run."""
        tensors = program.tensors
        reads_cache = any(not site.is_prompt for site in program.analysis(kv_sites))
        if self.inputs is None or tensors.recalled or reads_cache:
            self.unmeasured = self.unmeasured or RECALLED
            return None
        if isinstance(tensors, FromInputs):
            read = [given for n, given in zip(tensors.inputs_nodes, self.inputs, strict=True) if n.users]
            if any(isinstance(given, Tensor) and is_released(given) for given in read):
                self.unmeasured = "free_weights gave the float weights back, which the graph before the passes reads"
                return None
        elif program.analysis(kv_sites) or any(map(tensors.is_state, program.graph.nodes)):
            self.unmeasured = "an exported graph with state is compared as a whole, by running its file"
            return None
        try:
            return _run(program, self.inputs)
        except Exception as cause:  # whatever an operator raises
            if after:
                raise PassError(
                    f"debug: after {after} the graph does not run: {type(cause).__name__}: {cause}. "
                    f"Before and after: {self.index} ({self._name})"
                ) from cause
            self.unmeasured = f"the captured graph does not run by itself: {type(cause).__name__}: {cause}"
            self.inputs = None
            return None

    def _write(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as cause:
            raise _unwritable(self.folder, cause) from cause

    def _index(self) -> None:
        """This graph's part of the index, and the index anew from the parts of all processes."""
        mine = {
            "name": self.folder.name,
            "inputs": self.said,
            "variant": self.variant,
            "calls": self.calls,
            "unmeasured": self.unmeasured,
            "passes": [asdict(row) for row in self.rows],
        }
        self._write("graph.json", json.dumps(mine))
        root = self.folder.parent.parent
        runs = [{"name": run.name, "graphs": _graphs(run)} for run in sorted(root.glob("run-*"), reverse=True)]
        try:
            # Other processes write it too, and a browser may read it.
            write_text(self.index, graph_diff.index_page(runs))
        except OSError as cause:
            raise _unwritable(root, cause) from cause


def _run(program: Program, example_inputs: Sequence[Any]) -> list[Tensor]:
    # User tensors may be written to (caches), and so may state: run on copies.
    args = given = [_copied(hint(a) if isinstance(a, torch.SymInt) else a) for a in example_inputs]
    if isinstance(tensors := program.tensors, FromInputs):
        for site in program.analysis(kv_sites):
            at = tensors.position(site.count)
            holdings.register(given[at], site.capacity)
            holdings.restore(given[at], holdings.snapshot(example_inputs[at], copied=False))
        mine = {id(a) for a in given}
        args = [a if id(a) in mine else _copied(a) for a in tensors.arguments(given)]
    devices = {a.device for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        torch.manual_seed(0)  # graphs that draw numbers (dropout) must draw the same ones
        # An exported graph would want its arguments as the model took them.
        everything = tree_leaves(fx.Interpreter(program.gm).run(*args, enable_io_processing=False))
    return [t for t in everything[: len(program.results()[0])] if isinstance(t, Tensor)]


def _copied(given: Any) -> Any:
    return given.clone() if isinstance(given, Tensor) and not isinstance(given, torch.nn.Parameter) else given


@cache
def _run_folder(root: Path, process: int) -> Path:
    """This process's folder, which no other has; a fork has one of its own."""
    stamp = time.strftime("run-%Y%m%d-%H%M%S")
    return _fresh(root, (f"{stamp}-{process}{suffix}" for suffix in _suffixes()))


def _graph_folder(run: Path) -> Path:
    return _fresh(run, (f"graph-{number:03d}" for number in itertools.count(1)))


def _suffixes() -> Any:
    yield ""
    yield from (f"-{n}" for n in itertools.count(2))


def _fresh(parent: Path, names: Any) -> Path:
    """The first of ``names`` that nobody has made yet; making it is what claims it."""
    parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        return parent / name
    raise AssertionError("the names are without end")


def _graphs(run: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(run.glob("graph-*/graph.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError:
            continue  # another process is writing it, and will write the index after that
    return found


def _unwritable(where: Path, cause: OSError) -> PassError:
    return PassError(
        f"debug: {where} cannot be written: {cause.strerror or cause}. Set {VARIABLE} to a folder that can, "
        "or leave options={'debug': True} out"
    )
