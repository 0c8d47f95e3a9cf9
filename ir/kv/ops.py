"""The two ops that an ``accelpass.KVCache`` is to a graph. Their eager bodies keep everything, exactly.

Storage is found by the layer's counter, so that dense buffers exist only if a dense form is really run: compiled by this
library, the ops become state of whatever form the passes chose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from accelpass.ir.core.state import STATE, StateSpec
from accelpass.ir.errors import CacheError
from accelpass.ir.kv.holdings import holding_of
from accelpass.ir.torch_private import has_stopped_compiling

DENSE = "dense"
UNEVEN = "in layers of different lengths"
"""In the form of a cache of which some layers hold fewer tokens than others."""


def dense_state(k: Tensor, v: Tensor, capacity: int) -> tuple[StateSpec, StateSpec]:
    """Buffers for all tokens of a layer whose new keys and values are ``(batch, kv_heads, tokens, d)``."""

    def spec(name: str, like: Tensor) -> StateSpec:
        return StateSpec(f"kv.{name}", (like.shape[1], capacity, like.shape[3]), like.dtype, "sequence", batched=True)

    return spec("keys", k), spec("values", v)


def form(k: Tensor, v: Tensor, *how: str) -> tuple[str, ...]:
    """What tells one way of storing tokens from another (see :class:`~accelpass.ir.kv.holdings.Holding`).

    Args:
        how: the storage and the format of its rows; none for all tokens as they are.
    """
    return (*(how or (DENSE,)), str(k.dtype), f"{k.shape[1]} heads of {k.shape[3]} and {v.shape[3]}")


def _tell_uncompiled() -> None:
    warnings.warn(
        "a KVCache is filled by code that runs uncompiled, because Dynamo has compiled some function as often as it may: "
        "everything is kept, and no pass applies. Raise torch._dynamo.config.recompile_limit before the first call.",
        stacklevel=2,
    )


@torch.library.custom_op("accelpass::kv_append", mutates_args=("count",))
def kv_append(
    k: Tensor, v: Tensor, count: Tensor, capacity: int, window: int, records: bool, given: Sequence[Tensor]
) -> None:
    """Store new tokens after those that the layer holds.

    Args:
        k, v: ``(batch, kv_heads, tokens, d)``, keys as attention reads them (after the rotary embedding).
        count: tokens held, int64 ``(batch,)``; raised by ``tokens``.
        capacity: tokens that the layer can hold.
        window: how many of the newest tokens the layer's attention sees; 0 for all.
        records: the cache keeps what it needs to take the call's tokens back.
        given: what a pass hands to its storage besides; none in a model's own call.

    Raises:
        CacheError: the tokens do not fit.
    """
    holding, tokens = holding_of(count), k.shape[2]
    if has_stopped_compiling():
        _tell_uncompiled()
    holding.check(tokens, form(k, v), None, False)
    start = holding.tokens
    for spec, new in zip(dense_state(k, v, capacity), (k, v), strict=True):
        STATE.slot(count, spec).tensor[:, :, start : start + tokens] = new
    count.add_(tokens)
    holding.add(tokens, form(k, v), None)


@kv_append.register_fake
def _(k: Tensor, v: Tensor, count: Tensor, capacity: int, window: int, records: bool, given: Sequence[Tensor]) -> None:
    return None


@torch.library.custom_op("accelpass::kv_read", mutates_args=())
def kv_read(count: Tensor, k: Tensor, v: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """All keys and values of the layer, ``(batch, kv_heads, capacity, d)``; what is not written yet is zero.

    Args:
        k, v: tensors of the layer's dtype and heads (the newest ones).
    """
    if holding_of(count).form not in (None, form(k, v)):
        raise CacheError("this cache is compressed; read it with the compiled model that filled it, or cache.reset()")
    keys, values = (STATE.slot(count, s).tensor for s in dense_state(k, v, capacity))
    return keys.clone(), values.clone()


@kv_read.register_fake
def _(count: Tensor, k: Tensor, v: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return (
        k.new_empty((k.shape[0], k.shape[1], capacity, k.shape[3])),
        v.new_empty((v.shape[0], v.shape[1], capacity, v.shape[3])),
    )


KV_APPEND = torch.ops.accelpass.kv_append.default
KV_READ = torch.ops.accelpass.kv_read.default
