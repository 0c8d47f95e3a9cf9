"""A captured model part: its canonical graph and the tensors behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx

from accelpass.ir.core.tensors import TensorSource
from accelpass.ir.torch_private import tree_leaves

T = TypeVar("T")
BLOCK = "step_block"
"""Key of ``meta``: the number of the block that a node is the end of; -1 for all nodes in front of the blocks."""
NAME = "step_name"
"""Key of ``meta``: under which name a value of the model is known in every variant of the graph."""


@dataclass
class Program:
    """What analyses read and passes rewrite.

    Attributes:
        gm: graph in pre-dispatch ATen; never the graph that Dynamo owns.
        tensors: paths and values of the model's own tensors.
        frontend: ``dynamo`` or ``export``.
        artefacts: tensors from calibration, by name.
        actions: what each step-caching pass, by name, does at each site of this variant of the graph.
        kept_alive: how many outputs of the graph, after the model's own, only keep a block's streams alive.
        remembered: names of the graph's last outputs, which later denoising steps read.
        cut: where a graph break made this graph a piece of the model; empty if it is the whole.
        edited: which pass edited an aspect of a site, by (aspect, path).
        unwritten: names of inputs (counters of cache layers) that a pass has left unwritten on purpose.
        survivors: by module that chose some of a prompt's tokens, how many there were; which ones, ascending ``(batch, kept)``,
            is remembered as ``survivors:PATH``. None where no pass chooses.
        unfit: by pass that runs a model in stages, why this one has none; found before any pass changed the graph, as the cutting is.
        counts_padding: names of state in which padding is gathered with text.
    """

    gm: fx.GraphModule
    tensors: TensorSource
    frontend: str
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)
    actions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kept_alive: int = 0
    remembered: list[str] = field(default_factory=list)
    cut: str = ""
    edited: dict[tuple[str, str], str] = field(default_factory=dict)
    unwritten: set[str] = field(default_factory=set)
    survivors: dict[str, Any] | None = None
    unfit: dict[str, str] = field(default_factory=dict)
    counts_padding: list[str] = field(default_factory=list)
    _analyses: dict[Any, Any] = field(default_factory=dict, repr=False)

    def results(self) -> tuple[list[Any], list[fx.Node], list[fx.Node]]:
        """The graph's outputs: the model's own, those that :attr:`kept_alive` counts, and those that :attr:`remembered` names."""
        (output,) = self.graph.find_nodes(op="output")
        everything: list[Any] = tree_leaves(output.args[0])
        kept = len(everything) - len(self.remembered)
        own = kept - self.kept_alive
        return everything[:own], everything[own:kept], everything[kept:]

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def analysis(self, kind: Any) -> Any:
        """The result of an analysis (a function of the program), cached until :meth:`changed`."""
        if kind not in self._analyses:
            self._analyses[kind] = kind(self)
        return self._analyses[kind]

    def changed(self) -> None:
        """Forget cached analyses; the manager calls it after each pass that rewrote something."""
        self._analyses.clear()
