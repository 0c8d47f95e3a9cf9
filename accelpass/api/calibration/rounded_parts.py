"""What ``search_bits`` rounds: weights, or what linears and convolutions read; one part of a model at a time or several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.linear.rows import ROW_BITS, IntRows


class Parts(ABC):
    """What may have fewer bits, by module path.

    Attributes:
        modules: linears and convolutions by path.

    Class attributes:
        option: what a pass calls the bits.
        splits: average bits of the first of two groups, by those of the second (MixDQ's scans).
    """

    option: ClassVar[str]
    splits: ClassVar[Sequence[float]]

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    def look(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
        """What the model makes as it is; learns what is to be known of the parts."""
        return run(model)

    def check(self, offered: Sequence[int]) -> None:
        """Raise :class:`OptionError` for bits that there are not."""
        if not offered or any(c not in ROW_BITS for c in offered):
            raise OptionError(f"choices={list(offered)} is not supported; use some of {', '.join(map(str, ROW_BITS))}")

    def fits(self, path: str, bits: int) -> bool:
        """Whether a part can have so many bits."""
        return True

    @abstractmethod
    def entries(self, path: str) -> int:
        """How many numbers the part has."""

    @abstractmethod
    def rounded(self, bits: Mapping[str, int]) -> Any:
        """A context in which some parts are rounded."""


class Weights(Parts):
    """Weights, with a symmetric scale for each row."""

    option: ClassVar[str] = "bits"
    splits: ClassVar[Sequence[float]] = torch.linspace(0.46, 1.36, 10).tolist()

    def weight(self, path: str) -> nn.Parameter:
        found: nn.Parameter = self.modules[path].weight  # type: ignore[assignment]
        return found

    def fits(self, path: str, bits: int) -> bool:
        return bits == 8 or self.weight(path)[0].numel() % 8 == 0

    def entries(self, path: str) -> int:
        return self.weight(path).numel()

    @contextmanager
    def rounded(self, bits: Mapping[str, int]) -> Iterator[None]:
        before = {path: self.weight(path).data for path in bits}
        try:
            for path, number in bits.items():
                form, was = IntRows(number, symmetric=True), before[path]
                self.weight(path).data = form.unpack(form.pack(was.flatten(1)), was.dtype).view_as(was)
            yield
        finally:
            for path, data in before.items():
                self.weight(path).data = data


class Activations(Parts):
    """What linears and convolutions read, symmetric, in the range that it has in the run; as many entries as a call brings."""

    option: ClassVar[str] = "activation_bits"
    splits: ClassVar[Sequence[float]] = torch.linspace(0.94, 1.09, 20).tolist()

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.peaks: dict[str, float] = {}
        self.sizes: dict[str, int] = {}

    def check(self, offered: Sequence[int]) -> None:
        if not offered or any(c not in (4, 8) for c in offered):
            raise OptionError(f"choices={list(offered)} of inputs is not supported; use 4, 8 or both")

    def look(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
        def see(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
                self.peaks[path] = max(self.peaks.get(path, 0.0), float(given[0].detach().float().abs().amax()))
                self.sizes[path] = given[0].numel()

            return hook

        with self._hooked({path: see(path) for path in self.modules}):
            made = run(model)
        missed = [path for path in self.modules if path not in self.peaks]
        if missed:
            raise PassError(
                f"search_bits: run() did not call {missed[0]}, so that nothing is known of its input; exclude it"
            )
        return made

    def entries(self, path: str) -> int:
        return self.sizes[path]

    @contextmanager
    def rounded(self, bits: Mapping[str, int]) -> Iterator[None]:
        def rounding(path: str, number: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            most = 2 ** (number - 1) - 1
            step = self.peaks[path] / most or 1.0

            def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
                x = given[0]
                return ((x.float() / step).round().clamp(-most - 1, most).mul(step).to(x.dtype), *given[1:])

            return hook

        with self._hooked({path: rounding(path, number) for path, number in bits.items()}):
            yield

    @contextmanager
    def _hooked(self, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for path, hook in hooks.items():
                stack.callback(self.modules[path].register_forward_pre_hook(hook).remove)
            yield


KINDS: dict[str, type[Parts]] = {"weights": Weights, "activations": Activations}
