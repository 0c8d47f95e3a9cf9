"""A KV-cache method written eagerly, in the place of a model's attention: what its pass is compared with.

The oracle sees the keys and values of all tokens so far, and keeps for each layer what the method would have kept of them. It runs in a
transformers model, whose attention it becomes::

    class Newest(EagerAttention):
        def attend(self, layer, q, k, v, scale, mask, index):
            ...                                   # which of k and v are left is remembered in `layer`

    check_pass(MyPass, oracle=lambda model, p: attended(model, lambda: Newest(p.tokens)), models=["decoder", TURNS])
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.models_zoo import small
from accelpass.testing.subjects import Shape, Subject

_NAME = "accelpass_eager_cache"


class EagerAttention(ABC):
    """One method over all layers of a model, for one sequence of calls on one cache.

    Attributes:
        layers: by number, what is remembered of a layer; empty before its first call.
    """

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}

    @abstractmethod
    def attend(
        self, layer: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, index: int
    ) -> Tensor:
        """The attention of new tokens, ``(batch, heads, tokens, d)``.

        Args:
            layer: what the method remembers of this layer.
            q: of the new tokens, ``(batch, heads, tokens, d)``.
            k, v: of all tokens so far, the new ones last, ``(batch, kv_heads, all tokens, d)``.
            mask: what each query may see, ``(batch, 1, tokens, all tokens)``, True or 0 where it may; None: what is causal.
            index: the layer's number.
        """

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls an attention."""
        mask = attention_mask[..., : key.shape[2]] if attention_mask is not None else None
        layer = self.layers.setdefault(module.layer_idx, {})
        out = self.attend(layer, query, key, value, scaling, mask, module.layer_idx)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The softmax ``(batch, kv_heads, groups, tokens, keys)`` in float32, for operands of :meth:`EagerAttention.attend`; zeros for a
    query without keys.
    """
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    groups = heads // kv_heads
    scores = torch.einsum("bhgid,bhjd->bhgij", q.float().view(batch, kv_heads, groups, rows, width), k.float()) * scale
    if mask is None:
        i = torch.arange(columns - rows, columns)[:, None]
        scores = scores.masked_fill(torch.arange(columns)[None] > i, float("-inf"))
    else:
        allowed = mask if mask.dtype == torch.bool else mask == 0
        allowed = (
            allowed.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, groups))
            if allowed.shape[1] > 1
            else allowed[:, :, None]
        )
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1))


def mixed(p: Tensor, v: Tensor) -> Tensor:
    """Values ``v`` by probabilities ``p``, ``(batch, heads, tokens, d)``."""
    return torch.einsum("bhgij,bhjd->bhgid", p, v.float()).flatten(1, 2)


@contextmanager
def attending(model: Any, attention: EagerAttention) -> Iterator[Any]:
    """The model with ``attention`` in place of its own, while the block runs; gives a transformers cache for it."""
    from transformers import AttentionInterface, DynamicCache
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    AttentionInterface.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield DynamicCache(config=model.config)
    finally:
        model.config._attn_implementation = before


def attended(model: nn.Module, make: Callable[[], EagerAttention]) -> Callable[..., Any]:
    """What is called in the model's place, with an ``accelpass.KVCache`` as the model itself is: an oracle of the kit.

    Args:
        make: the method at its beginning; called for each cache.
    """
    held: weakref.WeakKeyDictionary[Any, tuple[EagerAttention, Any]] = weakref.WeakKeyDictionary()

    def call(*args: Any, past_key_values: Any = None, **given: Any) -> Any:
        method, cache = held.get(past_key_values, (None, None)) if past_key_values is not None else (None, None)
        method = method or make()
        with attending(model, method) as fresh:
            cache = cache or fresh
            if past_key_values is not None:
                held[past_key_values] = method, cache
                given["past_key_values"] = cache
            return model(*args, **given)

    return call


def _turns(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    """A prompt with padding on the left, six tokens, a second prompt and three tokens."""
    from accelpass.caches.kv_cache import KVCache

    pieces = [shape.length, *[1] * 6, 5, 1, 1, 1]
    cache = KVCache(model, capacity=64, batch_size=shape.batch)
    ids = shape.ids(small.VOCABULARY, sum(pieces) - shape.length)
    seen = torch.ones_like(ids)
    seen[0, : min(3, shape.length - 1)] = 0
    keep = {} if shape.every_token else {"logits_to_keep": 1}
    done = 0
    for tokens in pieces:
        end = done + tokens
        places = (seen[:, :end].cumsum(-1) - 1).clamp_min(0)[:, done:]
        given = {"attention_mask": seen[:, :end], "position_ids": places, "past_key_values": cache, **keep}
        yield fast(input_ids=ids[:, done:end], **given).logits
        done = end


TURNS = Subject(
    "turns",
    small.decoder,
    _turns,
    causal=True,
    delimited=True,
    needs=("transformers",),
    about="a Llama with an accelpass.KVCache: a padded prompt, tokens one by one, a second prompt, and tokens after it",
)
"""A model on which a cache evicts, goes on and is added to; for ``models=``, beside ``"decoder"``."""
