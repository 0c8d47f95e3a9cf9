"""Finds the first pass, and in it the first site, at which a model's output departs from the dense model's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.backends.compile.compiler import CompiledGraph, compiled
from accelpass.backends.compile.rewriting import copied
from accelpass.backends.debug.difference import largest_difference, shown
from accelpass.ir.core.graph import module_path
from accelpass.ir.errors import AccelpassError, OptionError
from accelpass.ir.torch_private import recompile_limit, tree_leaves
from accelpass.passes.core.manager import ordered
from accelpass.passes.core.options import Options, parse

TOLERANCE = 0.05
"""Of the largest output. Passes that are declared exact stay below 1e-3."""
NO_PASS = "(no pass)"
_CACHES = ("past_key_values", "cache_params")
"""Outputs that are what a model stores, in a form that passes may change."""

Call = Callable[[Any], Any]
"""Calls a model as its user does, once or many times, and returns outputs to compare."""


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        name: the pass that was switched on last, or the site.
        difference: largest relative change of an output against the dense model; infinite for NaN and for a failure.
        sites: how many sites it took; of a site, how many were on.
        error: what was raised, if the model did not run.
    """

    name: str
    difference: float
    sites: int = 0
    error: str = ""


@dataclass(frozen=True)
class Bisection:
    """What :func:`bisect` found.

    Attributes:
        passes: the model as captured, then with one pass more at a time, up to the first that departs.
        tried: sites of that pass, each with all sites before it on, in the order in which they were tried.
        guilty: the first pass that departs; None if none does.
        site: the first of its sites with which the output departs; None if no pass departs, or if the pass cannot leave
            single sites alone.
        before, alone: the difference with all sites before ``site``, and with ``site`` as the only one of the pass.
        left: names of passes that were not switched on any more.
    """

    tolerance: float
    passes: tuple[Trial, ...]
    guilty: str | None = None
    site: str | None = None
    tried: tuple[Trial, ...] = ()
    before: float | None = None
    alone: float | None = None
    left: tuple[str, ...] = ()
    why_no_site: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite difference is the string ``inf``, as JSON has no such number."""
        plain: dict[str, Any] = _finite(asdict(self))
        return {**plain, "next": self.next_step}

    @property
    def accumulated(self) -> bool:
        """The site alone stays within the tolerance: no single one is at fault."""
        return self.alone is not None and self.alone <= self.tolerance

    @property
    def found(self) -> str:
        """One sentence."""
        if self.guilty is None:
            return f"nothing departs by more than {self.tolerance:g}: {len(self.passes) - 1} passes were switched on"
        if self.guilty == NO_PASS:
            return "the captured graph departs already, before any pass: this is a defect of accelpass's capture"
        if self.site is None:
            return f"{self.guilty} is the first pass that departs; {self.why_no_site}"
        alone = "" if self.alone is None else f"; it alone: {shown(self.alone)}"
        how = ", where what all sites before it add up to crosses the tolerance" if self.accumulated else ""
        before, last = shown(self.before), next(t for t in self.tried if t.name == self.site)
        return f"{self.guilty} departs first at {self.site}{how} (before it: {before}, with it: {shown(last.difference)}{alone})"

    @property
    def next_step(self) -> str:
        """What to type next."""
        if self.guilty is None:
            return "a smaller tolerance= (--tolerance) shows which pass comes next to departing"
        look = 'options={"debug": True} writes the graphs before and after each pass, with their diff'
        if self.guilty == NO_PASS:
            return f"{look}; please report it with the model's name"
        if self.site is None:
            return f"{look}; leave {self.guilty} out to go on"
        if self.accumulated:
            return f"no single site is at fault; options of {self.guilty} that are closer to the dense model, or {look}"
        return f'options={{"skip_sites": {{"{self.guilty}": ["{self.site}"]}}}} leaves the site alone; {look}'

    def __str__(self) -> str:
        width = max(len(t.name) for t in self.passes)
        lines = [f"{'pass':<{width}}  sites  difference"]
        for trial in self.passes:
            departs = "  <- departs" if not trial.difference <= self.tolerance else ""
            what = trial.error or shown(trial.difference)
            lines.append(f"{trial.name:<{width}}  {trial.sites:>5}  {what}{departs}")
        lines += [f"{name:<{width}}      -  not reached" for name in self.left]
        if self.tried:
            lines += ["", f"sites of {self.guilty}, each with all that come before it:"]
            lines += [f"  {t.sites:>4}  {t.error or shown(t.difference):<12}  up to {t.name}" for t in self.tried]
        return "\n".join([*lines, "", self.found, f"next: {self.next_step}"])


def bisect(
    model: torch.nn.Module,
    passes: Sequence[Any],
    args: Sequence[Any] | Mapping[str, Any] | Call,
    *,
    tolerance: float = TOLERANCE,
    options: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Bisection:
    """Switch ``passes`` on one after the other, in the order in which they run, until the output departs.

    The sites of the first pass that departs are then halved, so that a model of many layers takes few runs. The site that
    is named is one whose rewriting takes the output over the tolerance, with all sites before it rewritten.

    Args:
        model: is not changed. Of a compiled one, what was compiled is looked at, and its compiled form stays as it is.
        passes: as in :func:`accelpass.compile`, which adds the passes that are on by default; ``[]`` for none.
        args: positional arguments, keyword arguments, or a function that calls the model it is given and returns what to
            compare: logits of several steps, an image. Every trial gets copies, so that a cache is always as it was.
        tolerance: largest change of an output, relative to the largest output.
        options: further ones, as in :func:`accelpass.compile`; ``lowering`` is ``"eager"`` unless they say otherwise.
        tell: is told what is being tried.

    Raises:
        OptionError: options or the tolerance are wrong.
        AccelpassError: the dense model's own output is NaN throughout, or Dynamo gave no graph.
    """
    if not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise OptionError(f"tolerance={tolerance!r}; it is a number of 0 or more, relative to the largest output")
    given = {"lowering": "eager", **(options or {}), "passes": list(passes)}
    chosen = replace(parse(given), free_weights=False, debug=False)
    with _uncompiled(model) as dense_model:
        return _bisect(dense_model, chosen, args, tolerance, tell)


def _bisect(
    model: torch.nn.Module,
    chosen: Options,
    args: Sequence[Any] | Mapping[str, Any] | Call,
    tolerance: float,
    tell: Callable[[str], None],
) -> Bisection:
    in_order = ordered(chosen.passes)
    trials = _Trials(model, args)
    tell("The dense model")
    dense = trials.dense()

    def measured(name: str, upto: int, skip: Sequence[str] = (), on: int | None = None) -> Trial:
        skipped = {**chosen.skip_sites}
        if skip:
            p = in_order[upto - 1].name
            skipped[p] = (*skipped.get(p, ()), *skip)
        tell(name if on is None else f"{on} sites, up to {name}")
        last = in_order[upto - 1].name if upto else None
        with_these = replace(chosen, passes=tuple(in_order[:upto]), skip_sites=skipped)
        return trials.measure(name, with_these, dense, last, on)

    rows = [measured(NO_PASS, 0)]
    for number, p in enumerate(in_order, 1):
        if not rows[-1].difference <= tolerance:
            break
        rows.append(measured(p.name, number))
    last = rows[-1]
    left = tuple(p.name for p in in_order[len(rows) - 1 :])
    result = Bisection(tolerance, tuple(rows), left=left)
    if last.difference <= tolerance:
        return result
    result = replace(result, guilty=last.name)
    if last.error:
        return replace(result, why_no_site="it does not run with it")
    sites, upto = trials.sites(last.name), len(rows) - 1
    if last.name == NO_PASS or not sites:
        return replace(result, why_no_site="it names no site")
    good, bad = 0, len(sites)
    tried = {bad: replace(last, name=sites[-1], sites=bad)}
    if len(sites) > 1:
        while bad - good > 1:
            middle = (good + bad) // 2
            tried[middle] = measured(sites[middle - 1], upto, sites[middle:], middle)
            if tried[middle].error:
                return replace(result, why_no_site=tried[middle].error)
            good, bad = (middle, bad) if tried[middle].difference <= tolerance else (good, middle)
    others = [s for s in sites if s != sites[bad - 1]]
    alone = tried[bad] if bad == 1 else measured(sites[bad - 1], upto, others, 1)
    before = tried[good].difference if good else rows[-2].difference
    return replace(
        result,
        site=sites[bad - 1],
        tried=tuple(tried[n] for n in tried),
        before=before,
        alone=None if alone.error else alone.difference,
    )


@contextmanager
def _uncompiled(model: Any) -> Iterator[torch.nn.Module]:
    """The model itself, where ``torch.compile(model)`` is given or ``model.compile()`` was called."""
    inner: Any = getattr(model, "_orig_mod", model)
    compiled_call, inner._compiled_call_impl = getattr(inner, "_compiled_call_impl", None), None
    try:
        yield inner
    finally:
        inner._compiled_call_impl = compiled_call


@dataclass
class _Trials:
    """Runs one model under different passes. Dynamo traces it once; its graphs are then compiled anew for each trial."""

    model: torch.nn.Module
    args: Sequence[Any] | Mapping[str, Any] | Call
    graphs: list[fx.GraphModule] = field(default_factory=list)
    made: dict[int, CompiledGraph] = field(default_factory=dict)
    chosen: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.fast = torch.compile(self.model, backend=self.backend)

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append(copied(gm))

        def run(*args: Any) -> Any:
            if number not in self.made:
                self.made[number] = compiled(copied(self.graphs[number]), args, self.chosen)
            return self.made[number](*args)

        return run

    def dense(self) -> list[Tensor]:
        outputs = self._outputs(self.model)
        if not outputs:
            raise AccelpassError("the model's output holds no tensor to compare; give a function that returns some")
        if all(t.is_floating_point() and bool(t.isnan().all()) for t in outputs):
            raise AccelpassError("the dense model's own output is NaN throughout, so nothing can depart from it")
        return outputs

    def measure(self, name: str, chosen: Options, dense: Sequence[Tensor], last: str | None, on: int | None) -> Trial:
        self.made, self.chosen = {}, chosen
        # Copies of a cache may each have a graph of their own, which must not be run eagerly in secret.
        with recompile_limit(1024, of_all=4096):
            try:
                outputs = self._outputs(self.fast)
            except Exception as cause:  # whatever a pass or an operator raises is what is looked for
                inner = getattr(cause, "inner_exception", None) or cause
                return Trial(name, math.inf, on or 0, f"{type(inner).__name__}: {str(inner).strip().splitlines()[0]}")
        if not self.made:
            raise AccelpassError(
                "Dynamo gave no graph of this call, so no pass could be applied; see TORCH_LOGS=graph_breaks"
            )
        taken = len(self.sites(last)) if last is not None and on is None else on or 0
        return Trial(name, largest_difference(dense, outputs), taken)

    def sites(self, name: str) -> list[str]:
        """What a pass took in the last trial, in the order in which the model runs it."""
        took = [site for g in self.made.values() for r in g.report.records if r.name == name for site in r.took]
        order: dict[str, int] = {}
        paths = (module_path(node) for graph in self.graphs for node in graph.graph.nodes)
        for number, path in enumerate(paths):
            parts = path.split(".") if path else []
            for end in range(1, len(parts) + 1):
                order.setdefault(".".join(parts[:end]), number)
        unique = dict.fromkeys(site.partition(" #")[0] for site in took)
        return sorted(unique, key=lambda site: order.get(site.partition(".{")[0], len(order) * len(order) + 1))

    @torch.no_grad()
    def _outputs(self, model: Any) -> list[Tensor]:
        with torch.random.fork_rng(_devices(self.model)):
            torch.manual_seed(0)  # a model that draws numbers must draw the same ones in each trial
            if callable(self.args):
                out = self.args(model)
            elif isinstance(self.args, Mapping):
                out = model(**copy.deepcopy(dict(self.args)))
            else:
                out = model(*copy.deepcopy(tuple(self.args)))
        if isinstance(out, Mapping):
            out = {k: v for k, v in out.items() if k not in _CACHES}
        return [t.detach().clone() for t in tree_leaves(out) if isinstance(t, Tensor)]


def _devices(model: torch.nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return "inf" if isinstance(data, float) and math.isinf(data) else data
