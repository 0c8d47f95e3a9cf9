"""A model's own graph with taps whose vectors are given at each call, so that a loss has a gradient in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from accelpass.ir import attention
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import STATE
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.torch_private import SET_GRAD_ENABLED, recompile_limit
from accelpass.ir.transform.tap import Tap, tap

_LENGTHS = 256
"""Graphs at most, one for each size of batches."""


class TappedGraph:
    """Calls the model; its weights get no gradient, the vectors do.

    Attributes:
        taps: the taps of a graph.
        vectors: gives the vectors of a call, by the name of the point (``name.0``, ``name.1`` of several).
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Callable[[Program], Sequence[Tap]],
        vectors: Callable[[], Mapping[str, Tensor]],
        by: str,
    ) -> None:
        self.model, self.taps, self.vectors, self.by = model, taps, vectors, by
        self._graph = torch.compile(model, backend=self._backend, dynamic=False, fullgraph=True)

    def __call__(self, **given: Any) -> Any:
        with torch.no_grad(), recompile_limit(_LENGTHS):
            return self._graph(**given)

    def close(self) -> None:
        """Forget the state that the taps declared."""
        STATE.discard([*self.model.parameters(), *self.model.buffers()], f"{self.by}.")

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = attention.captured(gm, inputs)
        assert isinstance(program.tensors, FromInputs)
        with torch.no_grad():
            slots = tap(program, self.taps(program), self.by)
            attention.lower(program)
        # The model was captured without gradients, and would put that state back in the middle.
        for node in program.graph.find_nodes(op="call_function", target=SET_GRAD_ENABLED):
            program.graph.erase_node(node)
        binder = program.tensors.binder()
        order = placeholders(program.gm)
        at = {name.removeprefix(f"{self.by}."): order.index(node) for name, node in slots.items()}
        program.gm.recompile()

        def run(*given: Any) -> Any:
            bound = [t.detach() if isinstance(t, Tensor) else t for t in binder(given)]
            with torch.enable_grad():
                vectors = self.vectors()
                for name, index in at.items():
                    bound[index] = vectors[name]
                return program.gm(*bound)

        return run
