"""A greedy loop over a static cache or an ``accelpass.KVCache``: one prefill, then one token at a time, so that two graphs serve any answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor


@dataclass
class Generated:
    """An answer and how long it took.

    Attributes:
        tokens: the new tokens alone.
        prefill_seconds: until the first of them.
        token_seconds: of each further token.
    """

    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, from the median token; 0 if a single token was made."""
        return 1 / median(self.token_seconds) if self.token_seconds else 0.0


def eos_tokens(model: Any) -> set[int]:
    """The tokens at which the model's own settings end an answer."""
    settings = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    return set(eos) if isinstance(eos, list | tuple) else set() if eos is None else {eos}


def changes_cache(options: dict[str, Any]) -> bool:
    """Whether a pass of these options decides how keys and values are kept."""
    from accelpass.passes.core.options import parse

    return any(p.phase == "cache" for p in parse(options).passes)


def cache_for(model: Any, length: int, options: dict[str, Any]) -> Any:
    """A cache for one sequence of ``length`` tokens in which these options take effect.

    Raises:
        CacheError: they change how keys and values are kept, and the model keeps them otherwise.
    """
    from accelpass.passes.core.options import parse

    # In a static cache a prompt's keys are as many as the cache is long, and no pass can tell that they are its own.
    if not changes_cache(options) and not any(p.for_prompts for p in parse(options).passes):
        return new_cache(model, length)
    from accelpass.caches.kv_cache import KVCache

    return KVCache(model, capacity=length)


def new_cache(model: Any, length: int, batch_size: int = 1) -> Any:
    """A static cache for sequences of ``length`` tokens, with its memory in place already.

    transformers allocates it at the first call otherwise, inside the compiled prefill: the second prefill would then
    find another cache and be compiled again.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Some families (multi-head latent attention) keep other shapes; they allocate on their own and compile once more.
    if not hasattr(config, "kv_lora_rank"):
        weight = next(model.parameters())
        cache.early_initialization(batch_size, kv_heads, head_dim, weight.dtype, weight.device)
    return cache


@torch.no_grad()
def greedy(
    fast: Any,
    input_ids: Tensor,
    cache: Any,
    max_new_tokens: int,
    eos: set[int] | frozenset[int] = frozenset(),
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Generate with ``fast``, the compiled model.

    Always under ``no_grad`` and never under inference mode: Dynamo guards on the grad mode, so a second mode would
    compile every graph a second time.

    Args:
        cache: of :func:`cache_for`; used from its beginning. It must hold the prompt and all new tokens but the last.
        eos: ends the answer; it is part of it.
        on_token: called with how many tokens exist.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; at least one token is generated")
    cache.reset()
    made = Generated()
    current = input_ids
    for number in range(max_new_tokens):
        started = time.perf_counter()
        out = fast(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Reading the token waits for the device, so the time is that of the work and not of its launch.
        token = int(out.logits[0, -1].argmax())
        seconds = time.perf_counter() - started
        if number == 0:
            made.prefill_seconds = seconds
        else:
            made.token_seconds.append(seconds)
        made.tokens.append(token)
        if on_token is not None:
            on_token(len(made.tokens))
        if token in eos:
            break
        current = input_ids.new_tensor([[token]])
    return made


def prompt_tokens(tokenizer: Any, prompt: str) -> Tensor:
    """The prompt through the model's chat template, or as it is where there is none."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
