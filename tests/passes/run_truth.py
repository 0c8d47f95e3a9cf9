"""A denoiser that reads a text, its eager oracle with cached blocks, and runs of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import accelpass
from accelpass.passes.core.plan import Plan
from accelpass.passes.step_cache.tokencache import IMPORTANCE, TokenCache
from tests.public.test_sampling import Block

TIMES = (0.9, 0.7, 0.5, 0.3, 0.1)
TOKENS, WIDTH = 12, 16


class Guided(nn.Module):
    """A denoiser that reads a text, and a residual like a ControlNet's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.time, self.text = nn.Linear(1, WIDTH), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, control: Tensor | None = None
    ) -> Tensor:
        at = timestep[..., None] if timestep.dim() == 2 else timestep[:, None, None]
        x = hidden_states + self.time(at) + self.text(encoder_hidden_states).mean(1, keepdim=True)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and control is not None:
                x = x + control
        return self.head(x)


class Cached(nn.Module):
    """A block that keeps what it adds for each branch by itself, as the test says which it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.kept = inner, {}
        self.branch, self.full = 0, True

    def forward(self, x: Tensor) -> Tensor:
        if self.full:
            self.kept[self.branch] = self.inner(x) - x
        return x + self.kept[self.branch]


class Oracle:
    """The eager model with cached blocks: ``full`` and ``branch`` of a call are given by the test."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.model.blocks = nn.ModuleList(Cached(b) for b in self.model.blocks)

    def __call__(self, full: bool, branch: int = 0, **given: Tensor) -> Tensor:
        for block in self.model.blocks:
            block.branch, block.full = branch, full
        return self.model(**given)


def noise(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def text(seed: int, length: int = 4, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(100 + seed))


def at(time: float, batch: int = 1) -> Tensor:
    return torch.full((batch,), time)


def settings(which: str, model: nn.Module, times: tuple[float, ...] = TIMES) -> dict[str, Any]:
    paths = [f"blocks.{n}" for n in range(len(model.blocks))]
    if which == "tokencache":
        made = TokenCache(paths=tuple(paths), timesteps=times, latents=(TOKENS, WIDTH), intervals=(2, 2), rotation=0)
        table = torch.rand(len(paths), len(times), TOKENS, generator=torch.Generator().manual_seed(1))
        return {"plan": Plan.of(model, [made], {IMPORTANCE: table})}
    if which == "ditfastattn":
        return {"passes": [{"name": which, "methods": dict.fromkeys(paths, "FAFAA")}]}
    return {"passes": [{"name": "delta_cache", "start": 0, "interval": 2}]}


def compiled(which: str, model: nn.Module) -> Any:
    return torch.compile(model, backend="accelpass", options={**settings(which, model), "lowering": "eager"})


def steps(
    fast: Any, seed: int, words: Tensor, times: tuple[float, ...] = TIMES, noisy: float = 0.0
) -> Iterator[Tensor]:
    """The model's results at the steps of a run, which goes on when the next is asked for."""
    x, generator = noise(seed), torch.Generator().manual_seed(1000 + seed)
    for time in times:
        with torch.no_grad():
            made = fast(hidden_states=x, timestep=at(time), encoder_hidden_states=words)
        yield made
        x = x - 0.3 * made + noisy * torch.randn(x.shape, generator=generator)


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def notes(fast: Any) -> str:
    return " ".join(accelpass.explain(fast).notes)
