"""A library against its graph run by torch, at the example's sizes and at others, before a package is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import torch
from torch import Tensor, fx

from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.stepped import Schedule
from accelpass.backends.package.compiling import Compiled, Rewritten, dynamic_sizes, inputs_at, state_of
from accelpass.backends.package.file.manifest import Graph, Size
from accelpass.backends.package.library import loaded

TOLERANCE = 0.02
"""Largest difference over the largest magnitude of an output. Products of many rows may be rounded to bfloat16 on the way, of
which this is a few steps; a wrong input or constant is off by its whole size."""
SLACK = 4
"""How many times further than rounding alone moves an output a library's may be, where that is more than the tolerance."""
CHAOS = 0.5
"""From here on, rounding has moved an output so far that it tells nothing."""
STEPS = 4
"""Tokens after the prompt by which a decoder's graphs are compared."""


class _Trio:
    """A library, its graph in torch, and that graph with float constants off by the rounding of bfloat16."""

    def __init__(self, made: Compiled) -> None:
        self.made, self.library = made, loaded(made.files, made.constants, 1)
        gm, noise = made.rewritten.made.gm, torch.Generator().manual_seed(0)
        held = {str(n.target): attrgetter(str(n.target))(gm) for n in gm.graph.find_nodes(op="get_attr")}
        self.truth: Any = gm
        self.moved: Any = fx.GraphModule({name: _moved(t, noise) for name, t in held.items()}, gm.graph)

    def far(self, inputs: Sequence[Tensor], states: Sequence[list[Tensor]]) -> float | None:
        """See :meth:`against`."""
        return self.against(inputs, states)[0]

    @torch.no_grad()
    def against(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[list[Tensor]] = ((), (), ()),  # type: ignore[assignment]
    ) -> tuple[float | None, list[Tensor]]:
        """How far the library is from the graph, each of the three with states of its own, and the graph's outputs; None where
        rounding moves these too far.

        Raises:
            ExportError: further than rounding explains.
        """
        got = self.library.run([*inputs, *states[0]])
        want, moved = (list(gm(*inputs, *own)) for gm, own in zip((self.truth, self.moved), states[1:], strict=True))
        names = self.made.graph.outputs
        rounding = max(map(relative, moved, want), default=0.0)
        if SLACK * rounding > CHAOS:
            return None, want
        return difference(names, got, want, max(TOLERANCE, SLACK * rounding)), want


def checked(graphs: dict[str, Compiled], schedule: Schedule[Rewritten] | None = None) -> tuple[float, list[str]]:
    """The largest difference, and notes; finds on the way which sizes of 1 a library takes, and writes that into the graphs.

    Args:
        schedule: of a model that samples in steps, which graph computes which; the whole run is compared.

    Raises:
        ExportError: a library computes something else than its graph.
    """
    trios = {name: _Trio(made) for name, made in graphs.items()}
    found: list[float | None] = []
    for name, trio in trios.items():
        made = trio.made
        if name == "decode":
            continue
        example = {v.name: made.rewritten.made.inputs[v.name] for v in made.graph.inputs}
        for size in dynamic_sizes(made.graph):
            found.append(trio.far(inputs_at(made.graph, example, size.name, 5), _states(made)))
            # torch.export compiles for 2 and more, and what it assumes of them seldom fails for 1: tried, not guessed.
            try:
                one = trio.far(inputs_at(made.graph, example, size.name, 1), _states(made))
            except (RuntimeError, ExportError):
                continue
            if one is not None:
                made.graph = _from_one(made.graph, size.name)
    if schedule is not None:
        found += _of_run(schedule, trios)
        return _told(found)
    first, *others = trios.values()
    states = _states(first.made)
    for trio, count in ((first, 1), *((other, STEPS) for other in others)):
        inputs = [trio.made.rewritten.made.inputs[v.name] for v in trio.made.graph.inputs]
        found += [trio.far(inputs, states) for _ in range(count)]
    return _told(found)


def _of_run(schedule: Schedule[Rewritten], trios: Mapping[str, _Trio]) -> list[float | None]:
    """How far each call of a run is off, its state as the graphs in torch keep it."""
    found: list[float | None] = []

    def run(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        # A library reads its inputs as they lay at packaging; an opened package makes them so.
        far, outputs = trios[name].against([inputs[n].contiguous() for n in schedule.graphs[name].made.inputs])
        found.append(far)
        return outputs

    schedule.replay({name: graph.made.inputs for name, graph in schedule.graphs.items()}, run)
    return found


def _told(found: Sequence[float | None]) -> tuple[float, list[str]]:
    """The largest difference, and a note on comparisons that tell nothing."""
    known = [far for far in found if far is not None]
    untold = len(found) - len(known)
    note = (
        f"{untold} of {len(found)} comparisons tell nothing, as rounding alone moves the example's outputs by more than {CHAOS / SLACK:.0%} "
        "of the largest: give an example that the model knows, a sentence for one"
    )
    return max(known, default=0.0), [note] if untold else []


def _states(made: Compiled) -> list[list[Tensor]]:
    return [state_of(made.rewritten) for _ in range(3)]


def _moved(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """``tensor`` as far off as rounding to bfloat16 might be, if it holds floats."""
    if not tensor.is_floating_point():
        return tensor
    off = (torch.rand(tensor.shape, generator=noise) * 2 - 1) * torch.finfo(torch.bfloat16).eps
    return (tensor.detach().float() * (1 + off)).to(tensor.dtype)


def relative(mine: Tensor, its: Tensor) -> float:
    """Largest difference over the largest magnitude of ``its``."""
    if not its.numel() or torch.equal(mine, its):
        return 0.0
    return float((mine.double() - its.double()).abs().max()) / max(float(its.double().abs().max()), 1e-6)


def difference(
    names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor], allowed: float = TOLERANCE
) -> float:
    """The largest difference of outputs over their largest magnitude.

    Raises:
        ExportError: it is more than is allowed; names the output.
    """
    worst = 0.0
    for name, mine, its in zip(names, got, want, strict=True):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            raise ExportError(
                f"{name} is {tuple(mine.shape)} {mine.dtype} when compiled, {tuple(its.shape)} {its.dtype} in torch"
            )
        far = relative(mine, its)
        if not far <= allowed:
            raise ExportError(
                f"{name} differs by {far:.1e} of its largest value between the compiled graph and torch, and {allowed:.1e} is "
                "allowed; package with verify=False and measure the answers yourself"
            )
        worst = max(worst, far)
    return worst


def _from_one(graph: Graph, size: str) -> Graph:
    inputs = [
        msgspec.structs.replace(
            v,
            shape=[
                msgspec.structs.replace(s, least=1) if isinstance(s, Size) and s.name == size else s for s in v.shape
            ],
        )
        for v in graph.inputs
    ]
    return msgspec.structs.replace(graph, inputs=inputs)
