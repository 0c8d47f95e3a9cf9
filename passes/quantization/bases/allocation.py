"""Which weight gets how many bits: an integer program over what each choice costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accelpass.ir.errors import AccelpassError, PassError


class NoSolver(AccelpassError):
    """The program is solved by scipy, which is not installed."""


def least_cost(name: str, tables: Mapping[str, Tensor], room: float, entries: int) -> dict[str, int]:
    """By weight, the place of its choice: the least sum of costs whose bits are no more than ``room``.

    Args:
        tables: by weight, costs and bits of its choices ``(2, choices)``.

    Raises:
        PassError: no choice fits; names the least that would.
    """
    least = sum(float(t[1].min()) for t in tables.values())
    if least > room:
        raise PassError(
            f"{name}: bits={room / entries:.2f} cannot be met with these choices; the least is {least / entries:.2f}"
        )
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as cause:
        raise NoSolver(f"{name} needs scipy ({cause}); pip install 'accelpass[search]'") from None
    cost, bits = (torch.stack([t[row] for t in tables.values()]).numpy() for row in (0, 1))
    known = np.isfinite(cost)
    count, width = cost.shape
    one_each = csr_array((np.ones(count * width), (np.repeat(np.arange(count), width), np.arange(count * width))))
    # In bits a weight: the solver's tolerances are absolute.
    within = csr_array(np.where(known, bits, 0.0).reshape(1, -1) / entries)
    found = milp(
        np.where(known, cost, 0.0).ravel(),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, room / entries)],
        bounds=Bounds(0, known.ravel().astype(float)),
        integrality=np.ones(count * width),
    )
    if found.x is None:
        raise PassError(f"{name}: the integer program was not solved: {found.message}")
    return dict(zip(tables, found.x.reshape(count, width).argmax(1).tolist(), strict=True))
