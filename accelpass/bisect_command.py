"""What ``accelpass bisect`` compares: the logits of a prompt and of a few tokens after it, whatever model it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from accelpass.bisection import Bisection, bisect
from accelpass.generation import cache_for, greedy
from accelpass.passes.options import DEFAULTS


def run(
    model: Any,
    ids: Tensor,
    options: dict[str, Any],
    tokens: int,
    tolerance: float,
    tell: Callable[[str], None],
) -> Bisection:
    """Bisect the passes of ``options``.

    Args:
        ids: the prompt, ``(1, tokens)``.
        tokens: how many tokens follow the prompt, the dense model's own answer; 0 for a model that generates nothing.
    """
    passes = options.get("passes")
    others = {k: v for k, v in options.items() if k != "passes"}
    typed: Any = DEFAULTS if passes is None else passes
    if not tokens:
        return bisect(model, typed, (ids,), tolerance=tolerance, options=others, tell=tell)
    length = ids.shape[1] + tokens
    tell("The dense model's answer")
    answer = greedy(model, ids, cache_for(model, length, {"passes": []}), tokens).tokens

    def logits(one: Any) -> list[Tensor]:
        # The same text for all: a token that another model would have chosen is no departure of this one.
        cache, made = cache_for(model, length, options), []
        for piece in (ids, *(ids.new_tensor([[token]]) for token in answer[: tokens - 1])):
            made.append(one(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
        return made

    return bisect(model, typed, logits, tolerance=tolerance, options=others, tell=tell)
