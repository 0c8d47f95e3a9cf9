"""Channels and heads taken out of architectures as their families write them, against the same weights set to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from accelpass.ir import attention
from accelpass.ir.analyses.axes.axes import Axis
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.program import Program
from accelpass.ir.transform.changed_axes import CannotShrink, Carrier, carriers
from accelpass.ir.transform.kept import Static, before_of, positions
from accelpass.ir.transform.shrink import shrink
from accelpass.models_zoo import tiny
from accelpass.passes.core.base import Skip
from accelpass.passes.pruning.magnitude_prune import MagnitudePrune
from tests.sweep import sweep

HALF = MagnitudePrune(channels=0.5, heads=0.5, multiple=4)
FAMILIES = {  # sites that are taken, and left
    "causal_lm/mpt": (4, 0), "causal_lm/bloom": (2, 2), "causal_lm/falcon": (2, 2), "causal_lm/gemma2": (4, 0),
    "causal_lm/gpt2": (4, 0), "causal_lm/gpt_neox": (4, 0), "causal_lm/llama": (4, 0), "causal_lm/mixtral": (2, 0),
    "causal_lm/phi3": (4, 0), "diffusion/flux": (8, 0), "diffusion/sd3": (8, 0), "image/swin": (8, 0), "image/vit": (4, 0),
    "masked_lm/bert": (4, 0),
}  # fmt: skip


@pytest.mark.parametrize("key", sweep(*FAMILIES))
def test_what_is_left_computes_what_zeros_would(key: str):
    build = tiny.family(key).build()
    kwargs = {**build.kwargs, **({"use_cache": False} if key.startswith("causal") else {})}
    programs: list[tuple[Program, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        with torch.no_grad():
            program = from_dynamo(gm, inputs)
            attention.insert(program)
        programs.append((program, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(build.model, backend=keep, dynamic=False)(**kwargs)
        ((program, inputs),) = programs
        zeros: list[tuple[Tensor, Carrier, Tensor]] = []
        taken = [_halved(program, site, zeros) for site in HALF.find(program)]
        assert (sum(taken), len(taken) - sum(taken)) == FAMILIES[key]
        attention.lower(program)
        given = program.tensors.arguments(inputs)
        program.gm.recompile()
        found = program.gm(*given)
        for weight, carrier, rows in zeros:
            mask = torch.zeros(before_of(carrier.leaves))
            mask[positions(carrier.leaves, rows)] = 1
            weight.mul_(mask.view([-1 if d == carrier.dim else 1 for d in range(weight.dim())]))
        wanted = build.model(**kwargs)
    tensors = [t for t in tree_leaves(list(wanted.values())) if isinstance(t, Tensor) and t.is_floating_point()]
    made = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]
    for want in tensors:
        error = min(float((got - want).abs().max()) for got in made if got.shape == want.shape)
        assert error < 1e-4 * max(1.0, float(want.abs().max()))


def _halved(program: Program, site: Any, zeros: list[tuple[Tensor, Carrier, Tensor]]) -> bool:
    """Take half of the rows out, by chance; what must be zero for the same effect is added to ``zeros``."""
    if isinstance(HALF.check(site, program), Skip):
        return False
    axis: Axis = site.dimension(program)[0]
    region = site.region(program)
    found = carriers(program, axis, region)
    weights = [program.tensors.value(c.weight) for c in found]
    draw = torch.Generator().manual_seed(len(zeros))
    rows = torch.randperm(int(axis.size), generator=draw)[: HALF.kept(site, int(axis.size))].sort().values
    try:
        shrink(program, axis, Static.rows(rows.tolist()), region)
    except CannotShrink:
        return False
    zeros += [(w, c, rows) for w, c in zip(weights, found, strict=True) if w is not None]
    return True
