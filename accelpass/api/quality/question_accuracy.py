"""``evaluate_questions``: how often a language model finds the right one of several options likeliest, with passes and without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.api.quality.evaluation import logits_of
from accelpass.ir.errors import OptionError


@dataclass(frozen=True)
class Question:
    """Options that may follow a text; ``answer`` is the number of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """What the passes cost, over questions.

    Attributes:
        questions: how many there are.
        dense, accuracy: share whose right option has the largest likelihood, without passes and with them.
        dense_by_length, accuracy_by_length: the same with each likelihood by the characters of its option.
        agreement: share for which both find the same option the likeliest.
    """

    questions: int
    dense: float
    accuracy: float
    dense_by_length: float
    accuracy_by_length: float
    agreement: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def read_questions(path: Path) -> list[Question]:
    """A JSONL of ``{"question": ..., "options": [...], "answer": number or text of an option}``.

    Raises:
        OptionError: a line is not that; says which.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_question(line, f"{path}, line {number}"))
    if not found:
        raise OptionError(f"{path} has no question")
    return found


def _question(line: str, where: str) -> Question:
    try:
        held = json.loads(line)
        question, options, answer = held["question"], held["options"], held["answer"]
    except (ValueError, KeyError, TypeError) as cause:
        raise OptionError(
            f'{where}: {{"question": ..., "options": [...], "answer": ...}} is needed ({cause!r})'
        ) from cause
    texts = isinstance(question, str) and isinstance(options, list) and all(isinstance(o, str) and o for o in options)
    if not texts or len(options) < 2:
        raise OptionError(f"{where}: a question is a text, and has two options or more, which are texts")
    if isinstance(answer, str) and answer in options:
        answer = options.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise OptionError(
            f"{where}: answer={answer!r} is none of the {len(options)} options; give its text, or its number from 0"
        )
    return Question(question, tuple(options), answer)


def evaluate_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    options: Mapping[str, Any] | None = None,
    on_question: Callable[[int], None] | None = None,
) -> Accuracy:
    """Compare a causal language model with itself under passes, by the likelihood of each option after its question.

    An option's likelihood is the product of those of its tokens, read after the question's; both texts are made tokens apart, with a
    space between (as lm-evaluation-harness scores multiple choice: ``acc``, and ``acc_norm`` by length).

    Args:
        model: returns logits, or what has ``logits``; not compiled.
        questions: see :func:`read_questions`.
        options: as of ``torch.compile``.
        on_question: is told how many are done.

    Raises:
        OptionError: there is no question.
    """
    if not questions:
        raise OptionError("evaluate_questions needs questions; there are none")
    fast = torch.compile(model, backend="accelpass", options=dict(options or {}))
    device = next(model.parameters()).device
    right, same = torch.zeros(4, dtype=torch.int64), 0
    for number, asked in enumerate(questions, 1):
        lengths = torch.tensor([len(o) for o in asked.options])
        scores = [_scores(call, tokenizer, asked, device) for call in (model, fast)]
        picked = [int(s.argmax()) for s in (*scores, *(s / lengths for s in scores))]
        right += torch.tensor([p == asked.answer for p in picked])
        same += picked[0] == picked[1]
        if on_question is not None:
            on_question(number)
    dense, ours, dense_by_length, by_length = (float(r) / len(questions) for r in right)
    return Accuracy(len(questions), dense, ours, dense_by_length, by_length, same / len(questions))


def _scores(call: Any, tokenizer: Any, asked: Question, device: torch.device) -> Tensor:
    """The log-likelihood of each option."""
    before = tokenizer(asked.question).input_ids
    found = []
    for option in asked.options:
        after = tokenizer(" " + option, add_special_tokens=False).input_ids
        ids = torch.tensor([[*before, *after]], device=device)
        with torch.no_grad():
            told = logits_of(call, ids)[0, len(before) - 1 : -1].float().log_softmax(-1)
        found.append(told.gather(1, ids[0, len(before) :, None]).sum().cpu())
    return torch.stack(found)
