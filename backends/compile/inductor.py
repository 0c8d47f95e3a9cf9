"""From a rewritten graph to machine code: Inductor, once for each different part of the graph or once for the whole."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from accelpass.backends.staged.repetition import compile_repeating
from accelpass.ir.core.graph import placeholders, value
from accelpass.ir.errors import CompilerMissingError
from accelpass.ir.inductor_private import NoCompiler, compile_with_inductor, contracts_by_name
from accelpass.ir.torch_private import FakeTensor, traced_tensors
from accelpass.passes.core.options import Options


def compile_graph(
    gm: fx.GraphModule,
    inputs: list[Any],
    chosen: Options,
    exact: bool,
    code: dict[Hashable, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Compile for inference.

    Args:
        inputs: real inputs, or fake ones.
        exact: results must equal the model's up to the order of float additions.
        code: parts that other graphs compiled, which gets what is new; see :func:`compile_repeating`.
    """
    if not exact:
        chosen = replace(chosen, inductor={**fused_multiply_add(), **chosen.inductor})
    # On a GPU the whole graph, launched in one sequence, is worth more than a short compilation.
    on_cpu = all(t.device.type == "cpu" for t in inputs if isinstance(t, Tensor))
    if chosen.regions and on_cpu:
        # What passes between parts was made by other parts; the graph's own inputs are checked by Dynamo's guards.
        settings = replace(chosen, inductor={"size_asserts": False, **chosen.inductor})
        stages = compile_repeating(gm, inputs, lambda part, given: compile_whole(part, given, settings), code)
        if stages is not None:
            return stages
    return compile_whole(gm, _with_known_sizes(gm, inputs), chosen)


def _with_known_sizes(gm: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """``inputs`` with a fake tensor for each that Dynamo has not seen.

    AOTAutograd would give a new tensor symbolic sizes that no guard can name: slower code, and guards without a source.
    """
    known = traced_tensors()
    return [
        value(node)
        if isinstance(given, Tensor) and given not in known and isinstance(value(node), FakeTensor)
        else given
        for node, given in zip(placeholders(gm), inputs, strict=True)
    ]


def fused_multiply_add() -> dict[str, Any]:
    """One rounding in place of two: a tenth of an int4 product's time, and below the rounding of any packed weight."""
    name = contracts_by_name()
    return {name: "fast"} if name else {}


def compile_whole(gm: fx.GraphModule, inputs: list[Any], chosen: Options) -> Callable[..., Any]:
    """Compile a graph, or a part, as one.

    Raises:
        CompilerMissingError: there is no C++ compiler that works.
    """
    try:
        return compile_with_inductor(gm, inputs, chosen.mode, chosen.inductor)
    except NoCompiler as failure:
        raise CompilerMissingError(
            f"Inductor needs a C++ compiler: {failure} Install one (apt install g++) or name yours in "
            "the environment variable CXX. options={'lowering': 'eager'} runs without one, slowly."
        ) from failure
