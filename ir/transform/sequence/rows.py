"""Some tokens' rows of a tensor, for each sequence its own."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """Rows along ``dim``, laid out one after the other as compiled code expects its inputs.

    Args:
        x: its first dimension is sequences, or 1 for all of them; with one sequence, ``dim`` may be 0.
        rows: int64 ``(batch, n)``.
    """
    if rows.shape[0] == 1:
        return x.index_select(dim, rows[0]).contiguous()
    x = x.expand(rows.shape[0], *x.shape[1:])
    return x.gather(dim, _index(x, rows, dim)).contiguous()


def write_rows(x: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write ``new (batch, n, ...)`` to rows of ``x (batch, tokens, ...)``."""
    x.scatter_(1, _index(new, rows, 1), new)


def _index(like: Tensor, rows: Tensor, dim: int) -> Tensor:
    shape = [rows.shape[0] if i == 0 else rows.shape[1] if i == dim else 1 for i in range(like.dim())]
    wide = [rows.shape[1] if i == dim else size for i, size in enumerate(like.shape)]
    return rows.view(shape).expand(wide)
