"""accelpass against plain ``torch.compile`` on one model: the same prompt, the same process, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.api.generation import Generated, cache_for, eos_tokens, greedy, new_cache, prompt_tokens
from accelpass.view.report import Report

BASELINES = {"inductor": "torch.compile", "eager": "eager"}
"""Lowering -> what the other contender is called. Unlowered, it must not pass for what Inductor can do."""
CANDIDATE = "accelpass"
PROMPT, TOKEN = "{}: compiling the prompt's graph", "{}: compiling the graph of one token"
FIRST, ROUND = "{}: answering for the first time", "{}: answering, {} of {}"


@dataclass
class Contender:
    """One compiled form of the model, and its runs."""

    name: str
    fast: Any
    cache: Any
    runs: list[Generated] = field(default_factory=list)

    @property
    def token_seconds(self) -> float:
        """Median over all tokens of all runs."""
        return median([s for run in self.runs for s in run.token_seconds] or [0.0])

    @property
    def prefill_seconds(self) -> float:
        return median(run.prefill_seconds for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Two contenders that ran in turns, and accelpass's report."""

    baseline: Contender
    candidate: Contender
    answers: dict[str, str]
    report: Report

    @property
    def ratio(self) -> float | None:
        """How many times faster a token is than the baseline's; None if only one token was made."""
        ours = self.candidate.token_seconds
        return self.baseline.token_seconds / ours if ours else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        contenders = []
        for c in (self.baseline, self.candidate):
            seconds = c.token_seconds
            contenders.append(
                {
                    "name": c.name,
                    "answer": self.answers[c.name],
                    "token_seconds": seconds,
                    "tokens_per_second": 1 / seconds if seconds else None,
                    "prefill_seconds": c.prefill_seconds,
                    "runs": len(c.runs),
                }
            )
        before, after = self.report.weight_bytes
        return {
            "contenders": contenders,
            "ratio": self.ratio,
            "weight_bytes": {"before": before, "after": after},
            "threads": torch.get_num_threads(),
        }


def compare(
    model: Any,
    tokenizer: Any,
    prompt: str,
    options: dict[str, Any],
    max_new_tokens: int,
    rounds: int = 3,
    stop_at_end: bool = True,
    on_step: Callable[[str], None] = lambda _: None,
    on_answer: Callable[[str, str], None] | None = None,
) -> Comparison:
    """Compile both, warm both up, then let them answer in turns, so that a slow minute of the machine hits both.

    accelpass comes first, and its answer is told before the baseline is compiled. Runs that are timed come after that.

    Args:
        options: of accelpass. With ``lowering="eager"`` the baseline is not lowered either.
        stop_at_end: end an answer at the model's end token; False times exactly ``max_new_tokens``.
        on_step: told what is going on, as :func:`parts` names it.
        on_answer: told the name and the answer of accelpass, as soon as it is there.
    """
    ids = prompt_tokens(tokenizer, prompt).to(next(model.parameters()).device)
    eos = eos_tokens(model) if stop_at_end else set()
    length = ids.shape[1] + max_new_tokens
    plain = options.get("lowering", "inductor")
    candidate = Contender(CANDIDATE, accelpass.compile(model, **options), cache_for(model, length, options))
    baseline = Contender(BASELINES[plain], torch.compile(model, backend=plain), new_cache(model, length))
    for c in (candidate, baseline):
        on_step(PROMPT.format(c.name))
        warm_up(c.fast, ids, c.cache, max_new_tokens, partial(_prompt_done, on_step, c))
        if c is candidate and on_answer is not None:
            on_step(FIRST.format(c.name))
            first = greedy(c.fast, ids, c.cache, max_new_tokens, eos)
            on_answer(c.name, tokenizer.decode(_answer(first.tokens, eos)))
    for number in range(rounds):
        for c in (candidate, baseline):
            on_step(ROUND.format(c.name, number + 1, rounds))
            c.runs.append(greedy(c.fast, ids, c.cache, max_new_tokens, eos))
    answers = {c.name: tokenizer.decode(_answer(c.runs[-1].tokens, eos)) for c in (baseline, candidate)}
    return Comparison(baseline, candidate, answers, accelpass.explain(candidate.fast))


def _prompt_done(on_step: Callable[[str], None], contender: Contender, _: int) -> None:
    on_step(TOKEN.format(contender.name))


def parts(lowering: str, rounds: int, layers: int) -> dict[str, float]:
    """What :func:`compare` tells ``on_step``, in order, with the seconds that it takes on two cores for layers of SmolLM2-135M.

    The times are those of one machine, and only their shares matter where another is slower.
    """
    compiling = lowering == "inductor"
    found: dict[str, float] = {}
    for name in (CANDIDATE, BASELINES[lowering]):
        # Equal layers are compiled once by accelpass, and each by Inductor alone.
        each = (12.0 if name == CANDIDATE else 4.0 + layers) if compiling else 1.0
        found |= {PROMPT.format(name): each, TOKEN.format(name): each}
        found |= {FIRST.format(name): 2.0} if name == CANDIDATE else {}
    turns = [ROUND.format(name, n + 1, rounds) for n in range(rounds) for name in (CANDIDATE, BASELINES[lowering])]
    return found | dict.fromkeys(turns, 2.0)


def warm_up(fast: Any, ids: Tensor, cache: Any, room: int, after_prompt: Callable[[int], None]) -> None:
    """Compile prefill and decode; the third token is the first that finds everything compiled."""
    greedy(fast, ids, cache, min(3, room), on_token=lambda made: after_prompt(made) if made == 1 else None)


def first_layers(model: Any, count: int) -> None:
    """Keep only the first layers, in place: what is left answers nonsense, and compiles in a fraction of the time."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    del body.layers[count:]
    model.config.num_hidden_layers = len(body.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def _answer(tokens: Sequence[int], eos: set[int]) -> Sequence[int]:
    return tokens[:-1] if tokens and tokens[-1] in eos else tokens
