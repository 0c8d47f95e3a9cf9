"""cache-dit on the digits model; run by ``digits_steps --peer`` with a Python that has cache-dit and accelpass.

A process of its own, since cache-dit brings its own requirements. It takes ``DiTPipeline`` as it is, and its transformer is
compiled as its documentation says, after the cache is on. A dense Inductor takes turns with it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import cache_dit
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

from accelpass.models_zoo import digits

DENSE = "inductor"
WARM_UP, FIRST = 4, 1
"""Steps that are computed in full first, of 50, and blocks that are computed always; its defaults of 8 and 8 are for models
of many more blocks."""
CANDIDATES: dict[str, tuple[float, bool] | None] = {
    DENSE: None,
    "cache-dit F1B0, 0.1": (0.1, False),
    "cache-dit F1B0, 0.2": (0.2, False),
    "cache-dit F1B0, 0.4": (0.4, False),
    "cache-dit F1B0, 0.2, TaylorSeer": (0.2, True),
    "cache-dit F1B0, 0.4, TaylorSeer": (0.4, True),
}
"""By name: the threshold of the residual's change, and whether it extrapolates."""


class Peer:
    """One candidate: its pipeline, and what was measured."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.pipe = name, steps, digits.pipeline()
        self.images: list[torch.Tensor] = []
        self.seconds: list[float] = []
        self.reused: list[float] = []
        how = CANDIDATES[name]
        self.blocks = len(self.pipe.transformer.transformer_blocks)
        if how is not None:
            threshold, taylor = how
            config = DBCacheConfig(
                num_inference_steps=steps,
                Fn_compute_blocks=FIRST,
                Bn_compute_blocks=0,
                max_warmup_steps=min(WARM_UP, steps // 2),
                residual_diff_threshold=threshold,
                enable_separate_cfg=False,
            )
            seer = TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
            cache_dit.enable_cache(self.pipe, cache_config=config, calibrator_config=seer)
            cache_dit.set_compile_configs()
        self.pipe.transformer = torch.compile(self.pipe.transformer)
        self._run(0)  # compiles

    def _run(self, seed: int) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        images = digits.sample(self.pipe, list(range(digits.CLASSES)), self.steps, seed)
        return images, time.perf_counter() - start

    def turn(self, seed: int) -> None:
        images, seconds = self._run(seed)
        self.images.append(images)
        self.seconds.append(seconds)
        self.reused.append(0.0 if CANDIDATES[self.name] is None else self._reused())

    def _reused(self) -> float:
        """Share of all blocks of the run that were not computed."""
        stats = cache_dit.summary(self.pipe, logging=False)
        return len(stats[0].cached_steps) / self.steps * (self.blocks - FIRST) / self.blocks

    def found(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "images": self.images,
            "seconds": self.seconds,
            "reused": sum(self.reused) / len(self.reused),
        }


def measure(steps: int, turns: int) -> list[dict[str, Any]]:
    """What was found of each candidate, the dense one first."""
    with torch._inductor.config.patch(force_disable_caches=True):
        peers = []
        for name in CANDIDATES:
            peers.append(Peer(name, steps))
            print(f"{name}: compiled", flush=True)
        for turn in range(turns):
            for peer in peers:
                peer.turn(turn)
            print(f"turn {turn + 1} of {turns}", flush=True)
    return [peer.found() for peer in peers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 256  # instances of one model are compiled by one function
    torch.save(measure(given.steps, given.turns), given.out)


if __name__ == "__main__":
    main()
