"""Low-rank changes of a model's projections (LoRA), learnt from the loss of the next token: the end of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from accelpass.ir.attention import detect
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, is_call
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed

STRENGTH = 2.0
"""By what the product is multiplied: LoLCATs' alpha of 16 over its rank of 8 (inferred)."""


class LowRank:
    """``W + 2 B A`` in the place of each weight ``W (out, in)`` of some; B begins at 0 (Hu et al., arXiv 2106.09685).

    Attributes:
        parts: A ``(rank, in)`` and B ``(out, rank)``, by the weight's path.
        changes: what makes the changed weight of the weight, by path.
    """

    def __init__(self, weights: Mapping[str, Tensor], rank: int, rate: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for path, w in weights.items():
            down = torch.randn(rank, w.shape[1], generator=draw) * w.shape[1] ** -0.5
            made = (down.to(w.device), torch.zeros(w.shape[0], rank, device=w.device))
            self.parts[path] = made[0].requires_grad_(), made[1].requires_grad_()
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {
            path: partial(changed, down=down, up=up) for path, (down, up) in self.parts.items()
        }
        self._optimizer = torch.optim.AdamW([t for part in self.parts.values() for t in part], rate, weight_decay=0.0)

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for part in self.parts.values() for t in part)

    def artefacts(self, by: str) -> dict[str, Tensor]:
        """For a plan of the pass ``by``."""
        named = ((path, zip(_NAMES, part, strict=True)) for path, part in self.parts.items())
        return {f"{by}/{path}/{name}": t.detach() for path, pairs in named for name, t in pairs}


_NAMES = ("down", "up")


def changed(w: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``W + 2 B A`` in W's dtype."""
    return (w.float() + STRENGTH * (up @ down)).to(w.dtype)


def change_projections(program: Program, attention: fx.Node, by: str) -> int:
    """Let the linears around an attention read their changed weights, which follow the model's; how many have one in the plan."""
    found = next((a for a in program.analysis(detect) if a.node is attention), None)
    linears: Sequence[fx.Node | None] = (
        () if found is None else (*found.q_proj, *found.k_proj, *found.v_proj, found.o_proj)
    )
    count = 0
    for node in dict.fromkeys(n for n in linears if n is not None and is_call(n, aten.linear)):
        weight = node.args[1]
        path = program.tensors.path(weight) if isinstance(weight, fx.Node) else None
        parts = [program.artefacts.get(f"{by}/{path}/{name}") for name in _NAMES]
        if path is None or not isinstance(weight, fx.Node) or any(t is None for t in parts):
            continue
        held = [t for t in parts if t is not None]
        recipe = Recipe(
            (by, "low rank", *map(digest, held)), lambda w, held=held: (changed(w, *placed(w, held)),), first=True
        )
        (made,) = program.tensors.derive([weight], recipe, [f"{weight.name}_tuned"])
        node.update_arg(1, made)
        count += 1
    return count
