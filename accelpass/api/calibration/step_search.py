"""``search_steps``: one sampling run in which a pass finds out what each step may leave out, and the plan of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from accelpass.api.calibration.searching import counting_bar, only_one
from accelpass.ir.torch_private import forget_compilations
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.step_cache.base import Searched

Sample = Callable[[Any], Any]


def search_steps(
    model: nn.Module,
    sample: Sample,
    passes: Sequence[Any],
    *,
    scheduler: str = "",
    steps: int | None = None,
    runs: int = 1,
    progress: bool = True,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Run the sampler and let a pass that works across denoising steps fit itself to what it sees.

    Args:
        model: the denoising model as it is, not compiled.
        sample: runs a whole sampling with the model that it is given, a few images at a fixed seed; its result is not
            used. ``def sample(model): pipe.transformer = model; pipe(...)``.
        passes: as in ``torch.compile``'s options; one of them searches, the others are in force meanwhile.
        scheduler: a name that is kept in the plan for people to read.
        steps: how many model calls a run has, for the progress bar alone.
        runs: how often ``sample`` is called; it should then choose another seed each time.
        options: further options of the backend.

    Returns:
        The plan; ``torch.compile(model, backend="accelpass", options={"plan": plan})`` follows it.

    Raises:
        OptionError: none of the passes, or more than one, is fitted in this way.
    """
    made = [make(p) for p in passes]
    one = only_one([p for p in made if isinstance(p, Searched)], "search_steps", "works across steps")
    others = [p for p in made if p is not one]
    with counting_bar(progress) as bar:
        task = bar.add_task(one.name, total=None if steps is None else steps * runs)

        def tell(what: str) -> None:
            bar.update(task, advance=1, description=f"{one.name}: {what}")

        search = one.search(tell)
        asked = {**(options or {}), **search.options, "passes": [search.in_search, *others]}
        forget_compilations()
        fast = torch.compile(model, backend="accelpass", options=asked)
        for _ in range(runs):
            sample(fast)
    found = search.found()
    if scheduler:
        found = replace(found, scheduler=scheduler)
    return Plan.of(model, [found, *others], search.tensors())
