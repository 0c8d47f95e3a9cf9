"""What ``accelpass bisect`` compares: the logits of a prompt and of a few tokens after it, whatever model it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelpass.cli import output
from accelpass.cli.loading import load, makes_text, options_of
from accelpass.cli.options import (
    QUESTION,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Lowering,
    LoweringOption,
    ModelArgument,
    PassesOption,
    PromptOption,
)
from accelpass.cli.terminal import guarded, step

if TYPE_CHECKING:
    from torch import Tensor

    from accelpass.api.bisection import Bisection


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
    from accelpass.api.bisection import bisect
    from accelpass.api.generation import cache_for, greedy
    from accelpass.passes.core.options import DEFAULTS

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


@guarded
def command(
    model: ModelArgument,
    passes: PassesOption = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Largest change of a logit, relative to the largest logit.")
    ] = 0.05,
    prompt: PromptOption = QUESTION,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens that are compared, from the prompt's last.")
    ] = 4,
    lowering: LoweringOption = Lowering.eager,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Find the first pass, and the first site in it, at which the output departs from the dense model's."""
    options = options_of(passes, lowering)
    from accelpass.api.generation import prompt_tokens

    with step(f"Loading {model}") as update:
        loaded, tokenizer = load(model, device, dtype)
        ids = prompt_tokens(tokenizer, prompt).to(device)
        found = run(loaded, ids, options, tokens if makes_text(loaded) else 0, tolerance, update)
    if as_json:
        output.as_json({"model": model, **found.to_dict()})
    else:
        print(found)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bisect")(command)
