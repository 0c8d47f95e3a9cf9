"""Which loops a model runs, told without compiling it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accelpass.ir.analyses.recurrence import Loop, loops
from accelpass.ir.core.capture import from_export


def recurrence(model: nn.Module, *args: Any, **kwargs: Any) -> list[Loop]:
    """The loops of tied blocks in one call, largest first: trips, what crosses them, what is read again, parameters. Print one to read it.

    What "A Survey on Latent Reasoning" (arXiv 2507.06203) calls vertical recurrence. The pass ``roll_loop`` folds the first that neither writes
    to a cache nor has its states collected.

    Args:
        args, kwargs: of an example call; ``torch.export`` captures it.
    """
    with torch.no_grad():
        found: list[Loop] = loops(from_export(torch.export.export(model, args, kwargs)))
    return found
