"""What packing costs in quality: SmolLM2's perplexity on English prose, and agreement with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.backends import graphs_of
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
PASSES: dict[str, list[Any] | None] = {
    "dense": None,
    "int8_weights": ["int8_weights"],
    "int8_dynamic": ["int8_dynamic"],
    "int4_weights, groups of 64": ["int4_weights"],
    "int4_weights, groups of 32": [{"name": "int4_weights", "group_size": 32}],
    "int4_weights, groups of 64, asymmetric": [{"name": "int4_weights", "symmetric": False}],
}


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


def measure(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Perplexity, agreement and weight bytes of each pass set; the lowered graphs are run without Inductor."""
    ids, dense = prose(tokenizer), answers(model, tokenizer)
    rows: list[dict[str, Any]] = []
    for name, passes in PASSES.items():
        torch._dynamo.reset()
        run = model if passes is None else torch.compile(
            model, backend="accelpass", options={"passes": passes, "lowering": "aten"}, dynamic=True
        )  # fmt: skip
        call = lambda ids, run=run: run(input_ids=ids, use_cache=False).logits  # noqa: E731
        row = {"name": name, "perplexity": perplexity(call, ids), "agreement": agreement(call, dense)}
        reports = [g.report for g in graphs_of(model)] if passes else []
        full = sum(p.numel() * p.element_size() for p in model.parameters())
        row["weight_bytes"] = reports[-1].after.weight_bytes if reports else full
        row["share_of_f32"] = row["weight_bytes"] / full
        rows.append(row)
        print(f"{name:40s} perplexity {row['perplexity']:.3f}  agreement {row['agreement']:.3f}  "
              f"bytes {row['share_of_f32']:.3f}", flush=True)  # fmt: skip
    return rows
