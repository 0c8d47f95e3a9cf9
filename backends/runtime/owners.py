"""Which models a compiled graph belongs to: the one that it was compiled for, and those that run it besides."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.ir.torch_private import Frame


class Owners:
    """The model tensors of one graph. Dynamo shares a graph among instances of a class, and among equal blocks of a model.

    Attributes:
        frame: the function that the graph was made of, as far as Dynamo tells.
        compiled_for: the tensors that it was compiled with; they may be gone.
        parameters: shape and dtype of each parameter that it reads, by path.
    """

    def __init__(self, places: Sequence[tuple[int, str]], example_inputs: Sequence[Any], frame: Frame | None) -> None:
        """
        Args:
            places: position among a call's arguments, and path, of each model tensor.
        """
        self.frame = frame
        self._places = sorted((p, path) for p, path in places if isinstance(example_inputs[p], Tensor))
        given = {path: example_inputs[p] for p, path in self._places}
        self.compiled_for = tuple(weakref.ref(t) for t in given.values())
        self.parameters: dict[str, tuple[torch.Size, torch.dtype]] = {
            path: (t.shape, t.dtype) for path, t in given.items() if isinstance(t, nn.Parameter)
        }
        self._last: weakref.ref[Tensor] | None = None
        self._ran: dict[int, tuple[weakref.ref[Tensor], dict[str, weakref.ref[Tensor]]]] = {}
        if self._places:
            self._note(example_inputs)

    @property
    def module(self) -> nn.Module | None:
        """The module whose method the graph was made of, if it is alive."""
        return None if self.frame is None or self.frame.module is None else self.frame.module()

    def read_at(self, positions: Collection[int]) -> list[Tensor]:
        """The model tensors at these positions among a call's arguments, of every model that has run the graph."""
        paths = [path for p, path in self._places if p in positions]
        return [tensors[path] for tensors in self.ran_with() for path in paths if path in tensors]

    def note(self, args: Sequence[Any]) -> None:
        """Remember whose call this is. One tensor tells; it is asked for at each call."""
        if self._places and (self._last is None or self._last() is not args[self._places[0][0]]):
            self._note(args)

    def _note(self, args: Sequence[Any]) -> None:
        first = args[self._places[0][0]]
        known = self._ran.get(id(first))
        if known is None or known[0]() is not first:
            key = id(first)
            alive = weakref.ref(first, lambda _: self._ran.pop(key, None))
            known = alive, {path: weakref.ref(args[p]) for p, path in self._places}
            self._ran[key] = known
        self._last = known[0]

    def ran_with(self) -> list[dict[str, Tensor]]:
        """The tensors, by path, of each model or block that has run the graph and is alive."""
        found = []
        for _, tensors in list(self._ran.values()):
            alive = {path: t for path, ref in tensors.items() if (t := ref()) is not None}
            if alive:
                found.append(alive)
        return found
