"""SmolLM2-135M, batch 1: decode and prefill of accelpass against torch.compile's Inductor and torchao.

Every candidate is compiled first; then they take turns, token by token (or prompt by prompt), so that whatever else the
machine does meets all of them alike. Medians are reported.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PROMPT, TOKENS, ROUNDS = 128, 64, 3
LONG_PROMPT, PREFILL_ROUNDS = 512, 9


@dataclass
class Candidate:
    """One way to run the model: how to make it, and what was measured."""

    name: str
    make: Callable[[torch.nn.Module], Any]
    dtype: torch.dtype = torch.float32
    fast: Any = None
    model: Any = None
    compile_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)


_CALL = """
def call(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits
"""


def own_call(source: str = _CALL) -> Any:
    """``call`` of a source, with a code object of its own: candidates neither share graphs nor each other's recompile limit."""
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope["call"]


def accelpass_with(**options: Any) -> Callable[[torch.nn.Module], Any]:
    # A copy: torch.compile takes out what is meant for Dynamo.
    return lambda model: torch.compile(own_call(), backend="accelpass", options={**options}, dynamic=False)


def inductor(model: torch.nn.Module) -> Any:
    return torch.compile(own_call(), dynamic=False)


def torchao_int8(model: torch.nn.Module) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return torch.compile(own_call(), dynamic=False)


# For a model whose modules are not changed any more; weights may be.
_UNGUARDED = torch.compiler.skip_guard_on_all_nn_modules_unsafe
CANDIDATES = {
    "inductor f32": (inductor, torch.float32),
    "inductor bf16": (inductor, torch.bfloat16),
    "torchao int8 (bf16)": (torchao_int8, torch.bfloat16),
    "accelpass, no options": (accelpass_with(), torch.float32),
    "accelpass int8_weights": (accelpass_with(passes=["int8_weights"]), torch.float32),
    "accelpass int8_weights, modules not guarded": (
        accelpass_with(passes=["int8_weights"], guard_filter_fn=_UNGUARDED),
        torch.float32,
    ),
    "accelpass int8_weights, one call": (accelpass_with(passes=["int8_weights"], regions=False), torch.float32),
    "accelpass int4_weights": (accelpass_with(passes=["int4_weights"]), torch.float32),
}


class Session:
    """One candidate in the middle of a text. The prompt is read by the model as it is: only decoding is compiled."""

    def __init__(self, candidate: Candidate, ids: Tensor, capacity: int):
        from transformers import StaticCache

        self.candidate = candidate
        self.cache = StaticCache(config=candidate.model.config, max_cache_len=capacity)
        self.next = candidate.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits.argmax(-1)

    def step(self) -> float:
        """Seconds of one more token."""
        start = time.perf_counter()
        self.next = self.candidate.fast(self.candidate.model, self.next, self.cache).argmax(-1)
        return time.perf_counter() - start


def _compiled(
    model: torch.nn.Module, name: str, say: Callable[[str], None], call: Callable[[Candidate], Any]
) -> Candidate:
    """A candidate on a copy of the model, compiled by its first call."""
    make, dtype = CANDIDATES[name]
    say(f"compiling {name}")
    own = copy.deepcopy(model).to(dtype)
    candidate = Candidate(name, make, dtype, model=own)
    start = time.perf_counter()
    candidate.fast = make(own)
    call(candidate)
    candidate.compile_seconds = time.perf_counter() - start
    say(f"  {candidate.compile_seconds:.0f} s")
    return candidate


def measure(model: torch.nn.Module, names: list[str], say: Callable[[str], None]) -> list[Candidate]:
    """Compile the candidates' decode step, then time it in turn."""
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    capacity = PROMPT + TOKENS + 4
    candidates = [_compiled(model, name, say, lambda c: Session(c, ids, capacity).step()) for name in names]
    for turn in range(ROUNDS):
        say(f"timing, round {turn + 1} of {ROUNDS}")
        sessions = [Session(candidate, ids, capacity) for candidate in candidates]
        for token in range(TOKENS):
            for session in sessions:
                seconds = session.step()
                if token >= 4:
                    session.candidate.seconds.append(seconds)
    return candidates


def measure_prefill(model: torch.nn.Module, names: list[str], say: Callable[[str], None]) -> list[Candidate]:
    """Compile the candidates for a long prompt, then time it in turn."""
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, LONG_PROMPT))
    read = lambda c: c.fast(c.model, ids, None)  # noqa: E731
    candidates = [_compiled(model, name, say, read) for name in names]
    for turn in range(PREFILL_ROUNDS):
        say(f"timing prefill, round {turn + 1} of {PREFILL_ROUNDS}")
        for candidate in candidates:
            start = time.perf_counter()
            read(candidate)
            candidate.seconds.append(time.perf_counter() - start)
    return candidates


def bandwidth() -> float:
    """Bytes a second that this machine streams from memory, by summing 256 MB."""
    big = torch.ones(64_000_000)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - start)
    return 256e6 / statistics.median(times)


def rows(candidates: list[Candidate], weight_bytes: dict[str, int], stream: float) -> list[dict[str, Any]]:
    """What is reported of each candidate's decode step."""
    base = next(c for c in candidates if c.name == "inductor f32")
    made = []
    for c in candidates:
        step = statistics.median(c.seconds)
        made.append(
            {
                "name": c.name,
                "ms_per_token": round(step * 1e3, 2),
                "tokens_per_second": round(1 / step, 1),
                "against_inductor_f32": round(statistics.median(base.seconds) / step, 2),
                "weight_bytes": weight_bytes[c.name],
                "share_of_bandwidth": round(weight_bytes[c.name] / step / stream, 3),
            }
        )
    return made


def prefill_rows(candidates: list[Candidate]) -> list[dict[str, Any]]:
    """What is reported of each candidate's prefill."""
    base = statistics.median(next(c for c in candidates if c.name == "inductor bf16").seconds)
    return [
        {
            "name": c.name,
            "ms": round(statistics.median(c.seconds) * 1e3, 1),
            "tokens_per_second": round(LONG_PROMPT / statistics.median(c.seconds)),
            "against_inductor_bf16": round(base / statistics.median(c.seconds), 2),
        }
        for c in candidates
    ]
