"""A model and its cache: reads pieces of a text, and forgets what was read of its end."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from accelpass.caches.kv_cache import KVCache
from accelpass.decoding.interfaces import DecodingError
from accelpass.decoding.tree import Tree
from accelpass.ir.kv import holdings
from accelpass.ir.torch_private import mark_static


class Reader:
    """Calls a model on a text piece by piece.

    Args:
        model: prepares its inputs (``prepare_inputs_for_generation``).
        cache: transformers' own, or an ``accelpass.KVCache``.
        kwargs: what ``generate`` gives the model besides: mask and positions of the prompt, images.
        call: what is called in place of the model: its compiled form.

    Attributes:
        asks_hidden: calls return hidden states as well, which ``hidden`` holds: the last ones ``(batch, tokens, width)`` of the last call.
    """

    asks_hidden = False
    hidden: Tensor | None = None

    def __init__(self, model: Any, cache: Any, kwargs: dict[str, Any], call: Any = None) -> None:
        self.model, self.cache, self.call = model, cache, model if call is None else call
        self.kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "logits_to_keep")}
        self.mask: Tensor | None = self.kwargs.pop("attention_mask", None)
        self.positions: Tensor | None = self.kwargs.pop("position_ids", None)
        self.held = int(cache.get_seq_length())
        self.prompt = self.held
        self.is_static = getattr(cache, "is_compileable", False)
        if not cache.is_croppable:
            raise DecodingError(
                f"a {type(cache).__name__} gives no tokens back, and guesses may be wrong; use accelpass.KVCache(model, "
                "capacity=...) or transformers.DynamicCache()"
            )

    def first(self, ids: Tensor) -> Tensor:
        """The logits ``(batch, 1, vocabulary)`` after a prompt, of which the cache may hold the beginning."""
        keep = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        new = ids.shape[1] - self.held
        inputs = self._prepared(ids, new if self.held else None, self.mask, self.positions, keep, True)
        self.prompt = self.held = ids.shape[1]
        # Nothing of a prompt is taken back: it is the graph that reads it without guesses, which another one would not equal bit for bit.
        for layer in self.cache.layers if isinstance(self.cache, KVCache) else ():
            layer.record_past = False
        logits = self._called(inputs)[:, -1:].float()
        self.cache.activate_past_recording()
        return logits

    def read(self, piece: Tensor, tree: Tree | None = None) -> Tensor:
        """The logits ``(batch, tokens, vocabulary)`` after each of some tokens ``(batch, tokens)``, float32.

        Pieces of one length are one compiled graph of just that size: with few rows, products are bound by the weights that they
        stream, and a graph for any number of rows is compiled for many.
        """
        inputs, _ = self.prepared(piece, tree)
        return self._called(inputs)[:, -piece.shape[1] :].float()

    def prepared(
        self, piece: Tensor, tree: Tree | None = None, masked: bool = True
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor | None] | None]:
        """The model's inputs for :meth:`read`, which hold the piece from now on.

        Args:
            masked: the mask of a tree is among them. Otherwise it is left to :func:`tree_mask`, whose numbers come second: how many
                tokens are held, and which of the cache's rows are none ``(batch, rows)``.
        """
        count = piece.shape[1]
        offsets = torch.arange(count, device=piece.device) if tree is None else tree.on(piece.device).depths
        mask = self.mask
        if mask is not None and (missing := self.held + count - mask.shape[1]) > 0:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], missing)], 1)
        shown = None
        if tree is not None:
            width = self.cache.layers[0].capacity if self.is_static else self.held + count
            held = torch.tensor(self.held, device=piece.device)
            wide = None if mask is None else torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
            shown = held, wide
            mask = tree_mask(self.model, tree.on(piece.device), *shown, width, len(piece)) if masked else None
        positions = self.positions
        if positions is not None:
            positions = positions[..., -1:] + (self.held - self.prompt + 1) + offsets
        elif tree is not None:
            positions = (self.held + offsets).expand(piece.shape[0], -1)
        inputs = self._prepared(piece, None, mask, positions, {}, False)
        if self.is_static:
            for value in inputs.values():
                for tensor in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(tensor, Tensor):
                        mark_static(tensor)
        self.held += count
        return inputs, shown

    def keep(self, tokens: int, rows: list[int] | None = None) -> None:
        """Hold the first ``tokens`` alone; ``rows``: their last ones are these of the last call, which ascend.

        Raises:
            CacheError: what was evicted or rounded for the others cannot be taken back.
        """
        if rows is not None and rows != list(range(len(rows))):
            start = tokens - len(rows)
            for layer in self.cache.layers:
                for rows_held in _tensors(layer):
                    at = torch.tensor(rows, device=rows_held.device) + start
                    rows_held[:, :, start:tokens] = rows_held.index_select(2, at)
        if self.held > tokens:
            self.cache.crop(tokens - self.held)
        self.held = tokens

    def _called(self, inputs: dict[str, Any]) -> Tensor:
        if not self.asks_hidden:
            return cast(Tensor, self.call(**inputs, return_dict=True).logits)
        made = self.call(**inputs, return_dict=True, output_hidden_states=True)
        self.hidden = made.hidden_states[-1]
        return cast(Tensor, made.logits)

    def _prepared(
        self, ids: Tensor, new: int | None, mask: Tensor | None, positions: Tensor | None, more: dict[str, Any],
        is_first: bool,
    ) -> dict[str, Any]:  # fmt: skip
        given = {**self.kwargs, **more}
        if positions is not None:
            given["position_ids"] = positions
        made: dict[str, Any] = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, past_key_values=self.cache, attention_mask=mask,
            is_first_iteration=is_first, **given,
        )  # fmt: skip
        return made


def tree_mask(model: Any, tree: Tree, held: Tensor, mask: Tensor | None, width: int, batch: int) -> Tensor:
    """Which of a cache's ``width`` rows each node sees: the text, those above it, itself. ``(batch, 1, nodes, width)``.

    Args:
        held: how many tokens the text has in the cache, a number.
        mask: which of these are no padding, ``(batch, width)``; None for all.
    """
    at = torch.arange(width, device=held.device)
    node = at - held
    own = tree.ancestors[:, node.clamp(0, tree.nodes - 1)] & (node >= 0) & (node < tree.nodes)
    text = (at < held).expand(batch, width) if mask is None else (at < held) & mask.bool()
    seen = text[:, None, None] | own
    if model.config._attn_implementation != "eager":
        return seen
    zeros = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
    return zeros.masked_fill(~seen, torch.finfo(model.dtype).min)


def takes_trees(model: Any, cache: Any) -> bool:
    """Whether each node of a tree may be a row of a call: all see what their mask says, and rows can be moved afterwards.

    False for caches that evict, round by importance or choose rows, for layers with a window, and for attention without a mask.
    """
    if getattr(model.config, "_attn_implementation", "") not in ("sdpa", "eager"):
        return False
    for layer in cache.layers:
        if hasattr(layer, "count"):
            if layer.window or not holdings.holding_of(layer.count).by_mask:
                return False
        elif type(layer).__name__ != "DynamicLayer":
            return False
    return bool(cache.layers)


def gives_back(cache: Any) -> bool:
    """Whether any of the newest tokens can be forgotten, those too that came one by one."""
    return all(not hasattr(layer, "count") or holdings.holding_of(layer.count).by_position for layer in cache.layers)


def _tensors(layer: Any) -> list[Tensor]:
    """What has a row for each token ``(batch, kv_heads, rows, ...)``."""
    if hasattr(layer, "count"):
        return [tensor for _, tensor in holdings.buffers_of(layer.count)]
    return [layer.keys, layer.values]
