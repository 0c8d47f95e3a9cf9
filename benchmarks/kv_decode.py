"""SmolLM2-135M: decoding after long prompts, with the cache as KV passes keep it.

Every candidate reads the same prose through its own compiled model; then they take turns, step by step, as in
:mod:`benchmarks.decode`. All but Inductor's have int8 weights, so that the cache is a large part of what a step reads; of
several sequences, which read the weights once, it is most.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass import KVCache
from accelpass.api.generation import new_cache
from benchmarks import decode
from benchmarks.kv_quality import EXACT
from benchmarks.kv_tasks import Row, prose

TOKENS, WARM = 104, 4
DENSE, INDUCTOR = "int8_weights, dense KVCache", "inductor f32, StaticCache"
SDPA = "int8_weights, StaticCache, torch's attention"
H2O = {"name": "h2o", "budget": 0.2}
FIXED = "+ h2o, 512 tokens"
BITS = {"name": "kv_quant", "bits": 4}
CANDIDATES: dict[str, list[Any] | None] = {
    INDUCTOR: None,
    SDPA: None,
    "int8_weights, StaticCache": None,
    DENSE: [],
    "+ h2o, 20 %": [H2O],
    FIXED: [{"name": "h2o", "tokens": 512}],
    "+ tidaldecode, 256 rows": ["tidaldecode"],
    "+ tidaldecode, 256 rows, two chosen anew": [{"name": "tidaldecode", "reselect": (7, 17)}],
    "+ mikv": ["mikv"],
    "+ kv_quant, 4 bits": [BITS],
    "+ h2o, 20 %, 4 bits": [H2O, BITS],
    "+ a2sf, 20 %": [{"name": "a2sf", "budget": 0.2}],
    "+ keyformer, 20 %": [{"name": "keyformer", "budget": 0.2, "answer": 512}],
    "+ zipvl": ["zipvl"],
    "+ tokenselect, 256 rows": [{"name": "tokenselect", "budget": 256}],
    "+ vidkv": ["vidkv"],
    "+ value_pruning, 256 rows": [{"name": "value_pruning", "values": 256}],
    "+ progressive_keys": ["progressive_keys"],
}
SHORT = (INDUCTOR, DENSE, "+ h2o, 20 %", FIXED)
"""What is also measured at a short context: whether time grows with it."""
BATCHED = (SDPA, DENSE, "+ h2o, 20 %", "+ tidaldecode, 256 rows", "+ tidaldecode, 256 rows, two chosen anew")
"""What is also measured of several sequences."""
Workload = tuple[int, int]
"""How many sequences, and the tokens of each."""
WORKLOADS: dict[Workload, Sequence[str]] = {
    (1, 1024): SHORT,
    (1, 4096): tuple(CANDIDATES),
    (1, 8192): tuple(CANDIDATES),
    (8, 4096): BATCHED,
    (4, 8192): BATCHED,
}
QUICK: dict[Workload, Sequence[str]] = {(1, 512): tuple(CANDIDATES), (2, 512): BATCHED}


@dataclass
class Session:
    """One candidate with one workload: its compiled call, its cache, and what was measured."""

    name: str
    model: torch.nn.Module
    capacity: int
    batch: int = 1
    next: Tensor = field(init=False)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        passes = CANDIDATES[self.name]
        own_cache = passes is not None
        make_cache = KVCache if own_cache else new_cache
        self.cache: Any = make_cache(self.model, self.capacity, self.batch)
        # The model's own attention calls, which passes that are on by default would write anew.
        layers = [f"model.layers.{i}.self_attn" for i in range(self.model.config.num_hidden_layers)]
        left = dict.fromkeys(("grouped_query", "cpu_decode_attention"), layers) if self.name == SDPA else {}
        accelerated = decode.accelpass_with(passes=["int8_weights", *EXACT, *(passes or [])], skip_sites=left)
        make = decode.inductor if self.name == INDUCTOR else accelerated
        self.fast = make(self.model)
        # A StaticCache is the same whoever fills it; a KVCache is filled as the passes say.
        self.reads = self.fast if own_cache else self._plain

    def read(self, ids: Tensor) -> float:
        """Seconds of the whole prompt, into the empty cache."""
        self.cache.reset()
        start = time.perf_counter()
        self.next = self.reads(self.model, ids, self.cache).argmax(-1)
        return time.perf_counter() - start

    def step(self) -> float:
        """Seconds of one token more of each sequence."""
        start = time.perf_counter()
        self.next = self.fast(self.model, self.next, self.cache).argmax(-1)
        return time.perf_counter() - start

    def cache_bytes(self) -> int:
        if isinstance(self.cache, KVCache):
            return self.cache.nbytes()
        tensors = (t for layer in self.cache.layers for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in tensors)

    @staticmethod
    def _plain(model: Any, ids: Tensor, cache: Any) -> Tensor:
        return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    workloads: dict[Workload, Sequence[str]],
    say: Callable[[str], None],
) -> list[Row]:
    """Rows for each workload; at each, those of its candidates that are in ``names``."""
    rows: list[Row] = []
    for workload, offered in workloads.items():
        # Another capacity is another graph, and Dynamo counts graphs of one function.
        torch._dynamo.reset()
        rows += table(measure_at(model, tokenizer, workload, [n for n in offered if n in names], say))
    return rows


def measure_at(
    model: torch.nn.Module, tokenizer: Any, workload: Workload, names: Sequence[str], say: Callable[[str], None]
) -> list[Session]:
    """Compile and fill each candidate, then time them in turn; the answers end at the context's last token."""
    batch, context = workload
    length = context - TOKENS - 1  # one token more is read when the step is compiled
    ids = tokenizer(prose(), return_tensors="pt").input_ids[0, : batch * length].view(batch, length)
    sessions = []
    for name in names:
        start = time.perf_counter()
        session = Session(name, model, context, batch)
        session.read(ids)
        session.step()
        sessions.append(session)
        say(f"{batch} x {context}: {name} compiled and filled, {time.perf_counter() - start:.0f} s")
    say(f"{batch} x {context}: timing {TOKENS - WARM} steps")
    for token in range(TOKENS):
        for session in sessions:
            seconds = session.step()
            if token >= WARM:
                session.seconds.append(seconds)
    return sessions


def table(sessions: list[Session]) -> list[Row]:
    """What is reported of each candidate; an empty cell where there is nothing to compare with."""
    named = {s.name: s for s in sessions}
    dense, inductor = named.get(DENSE), named.get(INDUCTOR)
    rows = []
    for s in sessions:
        step = statistics.median(s.seconds)
        held = s.cache_bytes()
        rows.append(
            {
                "batch": s.batch,
                "context": s.capacity,
                "name": s.name,
                "ms_per_step": round(step * 1e3, 2),
                "tokens_per_second": round(s.batch / step, 1),
                "against_dense": round(statistics.median(dense.seconds) / step, 2) if dense else "",
                "against_inductor_f32": round(statistics.median(inductor.seconds) / step, 2) if inductor else "",
                "cache_bytes": held,
                "share_of_dense": round(held / dense.cache_bytes(), 3) if dense else "",
            }
        )
    return rows
