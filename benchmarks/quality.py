"""What packing costs in quality: SmolLM2's perplexity on English prose, and agreement with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from accelpass.cli.text_data import ids_of

WINDOW, TOKENS = 1024, 4096
ANSWER = 24
PROMPTS = (
    "What is the capital of France?", "Name three primary colours.", "How many legs does a spider have?",
    "Write one sentence about the sea.", "What is 12 times 9?", "Who wrote Romeo and Juliet?",
    "Explain gravity to a child.", "Give an antonym of 'cold'.", "What do bees make?",
    "Translate 'good morning' into Spanish.", "What is the largest planet?", "List two uses of a hammer.",
    "Why is the sky blue?", "What is the boiling point of water in Celsius?", "Name a mammal that can fly.",
    "Write a short greeting for a birthday card.", "What is photosynthesis?", "Which month has 28 days?",
    "What does a thermometer measure?", "Finish the sentence: the early bird catches the",
)  # fmt: skip


def prose(tokenizer: Any, tokens: int = TOKENS) -> Tensor:
    """The first tokens of Python's own reference text, which every CPython ships."""
    return ids_of(tokenizer, None)[:, :tokens]


def perplexity(call: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Over windows of 1024 tokens, each scored from its second token on."""
    total, count = 0.0, 0
    for window in ids.split(WINDOW, dim=1):
        logits = call(window)[0, :-1].float()
        total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return math.exp(total / count)


def answers(model: Any, tokenizer: Any) -> list[tuple[Tensor, int]]:
    """Greedy answers of the dense model: (prompt and answer, length of the prompt)."""
    made = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        made.append((out, ids.input_ids.shape[1]))
    return made


def agreement(call: Callable[[Tensor], Tensor], dense: list[tuple[Tensor, int]]) -> float:
    """Share of answer tokens that the model, given the dense answer so far, would have chosen too."""
    same, count = 0, 0
    for ids, start in dense:
        chosen = call(ids)[0, start - 1 : -1].argmax(-1)
        same += int((chosen == ids[0, start:]).sum())
        count += ids.shape[1] - start
    return same / count
