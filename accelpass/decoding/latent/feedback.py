"""Continuous thoughts: the last hidden state is the next input, for some steps before a token is said (Coconut)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.interfaces import DecodingError


class Thinker:
    """Decodes with steps that feed hidden states back; thoughts and tokens are one step, so that one graph is compiled for both.

    "Training-induced recurrence" of "A Survey on Latent Reasoning" (arXiv 2507.06203), as in Coconut (arXiv 2412.06769): nothing here makes a
    model reason in its states that was not trained for it. That thinking may end where a thought repeats the one before is inferred from the
    survey's halting by convergence.

    Args:
        model: a causal model of transformers that takes ``inputs_embeds``.
        call: the compiled model, if ``model`` is not compiled in place.
        exit_eps: thinking ends where no sequence's thought differs from the one before by more than this share of its norm; 0 never.

    Attributes:
        thoughts: how many the last text had.
    """

    def __init__(self, model: Any, call: Any = None, exit_eps: float = 0.0) -> None:
        if not 0 <= exit_eps < 1:
            raise DecodingError(f"exit_eps={exit_eps}: a share of the norm, from 0, below 1")
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "prepare_inputs_for_generation"):
            raise DecodingError(f"{type(model).__name__} is no causal decoder with embeddings")
        self.model, self.call, self.exit_eps = model, model if call is None else call, exit_eps
        self.thoughts = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any, thoughts: int, new_tokens: int, *, eos: int | None = None) -> Tensor:
        """The prompts and the likeliest tokens after ``thoughts`` steps in hidden states, ``(batch, tokens + at most new_tokens)``.

        Args:
            ids: prompts of one length ``(batch, tokens)``, without padding.
            cache: empty, with room for prompt, thoughts and tokens: an ``accelpass.KVCache`` or a cache of transformers.
            thoughts: hidden states that are fed back; 0 is plain decoding.
            eos: texts end there; the rest is filled up with it.

        Raises:
            DecodingError: the cache is not empty or too small; a thought is not a number.
        """
        room = getattr(cache, "capacity", None)
        needed = ids.shape[1] + thoughts + new_tokens - 1
        if thoughts < 0 or new_tokens < 1:
            raise DecodingError(f"thoughts={thoughts}, new_tokens={new_tokens}: at least 0 and 1")
        if int(cache.get_seq_length()) or (room is not None and room < needed):
            raise DecodingError(
                f"the cache holds {int(cache.get_seq_length())} tokens of {room}; it must be empty, with room for {needed}"
            )
        embed = self.model.get_input_embeddings()
        logits, state = self._step(embed(ids), cache)
        self.thoughts = 0
        while self.thoughts < thoughts:
            before = state
            logits, state = self._step(state, cache)
            self.thoughts += 1
            change = (state - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
            worst = float(change.max())
            if math.isnan(worst):
                raise DecodingError(f"thought {self.thoughts} is not a number; think less, or in float32")
            if worst < self.exit_eps:
                break
        text, ended = ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for number in range(new_tokens):
            token = logits.argmax(-1)
            if eos is not None:
                token = torch.where(ended, eos, token)
                ended = ended | (token == eos)
            text = torch.cat([text, token[:, None]], 1)
            if number + 1 == new_tokens or bool(ended.all()):
                break
            logits, _ = self._step(embed(token[:, None]), cache)
        return text

    def _step(self, embeds: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, vocabulary)`` and the last hidden state ``(batch, 1, width)`` after some inputs."""
        start = int(cache.get_seq_length())
        at = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
        made = self.call(
            inputs_embeds=embeds,
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
            return_dict=True,
        )
        return made.logits[:, -1], made.hidden_states[-1][:, -1:]
