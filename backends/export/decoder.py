"""The key/value cache among a call's arguments, and the call for one more token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelpass.backends.export.errors import ExportError

if TYPE_CHECKING:
    from accelpass.caches.kv_cache import KVCache

_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
"""Arguments whose second dimension are the tokens of a call."""


def _is_cache(held: Any) -> bool:
    return type(held).__module__ == "accelpass.caches.kv_cache" and type(held).__name__ == "KVCache"


def refuse_kept(model: torch.nn.Module) -> None:
    """Raise :class:`ExportError` for a KVCache that a module keeps as an attribute: a file's state goes in and comes out."""
    for path, module in model.named_modules():
        for name, held in vars(module).items():
            if _is_cache(held):
                raise ExportError(
                    f"the model keeps a KVCache as its attribute {f'{path}.{name}'.strip('.')}, and a file's state has to go in and "
                    "come out: let forward take it as an argument (past_key_values=cache), and give an empty one"
                )


def cache_of(given: Mapping[str, Any]) -> tuple[str, KVCache] | None:
    """The KVCache among the arguments and its name.

    Raises:
        ExportError: it holds tokens already.
    """
    for name, held in given.items():
        if _is_cache(held):
            if held.seen:
                raise ExportError(f"the KVCache holds {held.seen} tokens; give an empty one: {name}.reset()")
            return name, held
    return None


def decoding(given: Mapping[str, Any], place: str, decode: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call for one more token, made from a prompt's or given as ``decode``.

    Raises:
        ExportError: what a tensor is for such a call is not known.
    """
    if decode is not None:
        return {**decode, place: given[place]}
    made = dict(given)
    for name, held in given.items():
        if isinstance(held, Tensor):
            if name not in _OF_TOKENS:
                raise ExportError(
                    f"what {name} is in a call for one token is not known; give that call's arguments: "
                    "decode={'input_ids': ..., " + repr(name) + ": ...}"
                )
            made[name] = held[:, :1].contiguous()
    return made
