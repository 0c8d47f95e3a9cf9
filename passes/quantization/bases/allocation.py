"""Which weight gets how many bits: an integer program over what each choice costs."""

from __future__ import annotations

from collections.abc import Mapping

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
    return chosen(name, tables, 0, 1, room, "bits", entries)


def chosen(
    name: str, tables: Mapping[str, Tensor], least: int, within: int, room: float, budget: str, share: float = 1.0
) -> dict[str, int]:
    """By weight, the place of its choice: the least sum of one row of the tables, that of another being no more than ``room``.

    Args:
        tables: by weight, what its choices take ``(rows, choices)``; infinite for one that it cannot have.
        least, within: the rows.
        budget: what the user calls ``room``, in units of ``share``.

    Raises:
        PassError: no choice fits; names the least that would.
    """
    smallest = sum(float(t[within].min()) for t in tables.values())
    if smallest > room:
        raise PassError(
            f"{name}: {budget}={room / share:.2f} cannot be met with these choices; the least is {smallest / share:.2f}"
        )
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as cause:
        raise NoSolver(f"{name} needs scipy ({cause}); pip install 'accelpass[search]'") from None
    known = np.stack([t[[least, within]].isfinite().all(0).numpy() for t in tables.values()])
    # Scaled to about one: the solver's tolerances are absolute.
    cost, taken = (np.where(known, np.stack([t[row].numpy() for t in tables.values()]), 0.0) for row in (least, within))
    cost, limit = cost / (np.abs(cost).max() or 1.0), room / share
    count, width = cost.shape
    one_each = csr_array((np.ones(count * width), (np.repeat(np.arange(count), width), np.arange(count * width))))
    found = milp(
        cost.ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(taken.reshape(1, -1) / share), -np.inf, limit),
        ],
        bounds=Bounds(0, known.ravel().astype(float)),
        integrality=np.ones(count * width),
    )
    if found.x is None:
        raise PassError(f"{name}: the integer program was not solved: {found.message}")
    return dict(zip(tables, found.x.reshape(count, width).argmax(1).tolist(), strict=True))
