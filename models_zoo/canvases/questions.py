"""Canvases of handwritten digits, questions about them, and the words of both.

A canvas is a mosaic of 2 x 2 cells of 24 x 24 pixels; each shows one of scikit-learn's digits (enlarged to 16 x 16) somewhere. The model
reads it in five tiles of 24 x 24, each named by a word: the whole canvas at half size, and the four cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from accelpass.models_zoo import digits

CELL, PATCH, TILES, ASKED = 24, 4, 5, 6
PATCHES = (CELL // PATCH) ** 2
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLURALS = ["zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
_ASKING = ["which", "digit", "is", "how", "many", "are", "there", "?"]
WORDS = [
    "<pad>",
    "<start>",
    "<end>",
    "<image>",
    "whole",
    "top",
    "bottom",
    "left",
    "right",
    *_ASKING,
    *NUMBERS,
    *PLURALS,
]
PAD, START, END, IMAGE = range(4)
specimens = cache(digits.specimens)


class Vocabulary:
    """The words that a model knows, by number."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._number = {word: at for at, word in enumerate(words)}

    def ids_of(self, text: str) -> list[int]:
        """The words of a text as numbers.

        Raises:
            KeyError: a word that the model has never seen.
        """
        return [self._number[word] for word in text.replace("?", " ?").split()]

    def text_of(self, ids: Tensor) -> str:
        return " ".join(self.words[int(i)] for i in ids)


_VOCABULARY = Vocabulary(WORDS)
ids_of, text_of = _VOCABULARY.ids_of, _VOCABULARY.text_of


@dataclass(frozen=True)
class Asked:
    """Canvases, or videos, and questions about each.

    Attributes:
        canvases: ``(n, 1, 48, 48)`` in -1..1; of videos ``(n, frames, 1, 24, 24)``.
        questions, answers: of each canvas, :data:`ASKED`: where a digit stands, four times, and how many there are, twice.
    """

    canvases: Tensor
    questions: list[list[str]]
    answers: list[list[str]]


def canvases(count: int, held_out: bool, generator: torch.Generator) -> Asked:
    """Canvases of specimens that are held out of training, or of the others, and questions.

    A canvas repeats a digit more often than chance does, so that counting is not always "one" or "zero".
    """
    cells, labels = specimens(held_out)
    classes = torch.randint(digits.CLASSES, (count, 4), generator=generator)
    again = torch.rand(count, 4, generator=generator) < 0.3
    classes = torch.where(again, classes[:, :1], classes)
    pools = [(labels == digit).nonzero().flatten() for digit in range(digits.CLASSES)]
    shown = torch.full((count, 4, 1, CELL, CELL), -1.0)
    for canvas in range(count):
        for cell in range(4):
            pool = pools[int(classes[canvas, cell])]
            image = cells[pool[int(torch.randint(len(pool), (), generator=generator))]]
            down, right = torch.randint(CELL - digits.CELL + 1, (2,), generator=generator).tolist()
            shown[canvas, cell, :, down : down + digits.CELL, right : right + digits.CELL] = image
    whole = shown.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(count, 1, 2 * CELL, 2 * CELL)
    questions, answers = [], []
    for row in classes.tolist():
        some = row[int(torch.randint(4, (), generator=generator))]
        other = int(torch.randint(digits.CLASSES, (), generator=generator))
        counted = [(some, row.count(some)), (other, row.count(other))]
        questions.append(
            [f"which digit is {place} ?" for place in PLACES]
            + [f"how many {PLURALS[digit]} are there ?" for digit, _ in counted]
        )
        answers.append([NUMBERS[digit] for digit in row] + [NUMBERS[number] for _, number in counted])
    return Asked(whole, questions, answers)


def tiles(canvas: Tensor) -> Tensor:
    """What the tower reads of canvases ``(n, 1, 48, 48)``: ``(5 n, 1, 24, 24)``, of each the whole and its cells."""
    small = F.interpolate(canvas, size=(CELL, CELL), mode="area").unsqueeze(1)
    cells = canvas.unflatten(2, (2, CELL)).unflatten(4, (2, CELL)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([small, cells], 1).flatten(0, 1)


def prompt(question: str, patches: int = PATCHES) -> list[int]:
    """The text before the answer, with a place for each patch of a tile."""
    ids = [START]
    for name in ("whole", *PLACES):
        ids += [*ids_of(name), *[IMAGE] * patches]
    return ids + ids_of(question)


@dataclass(frozen=True)
class Processor:
    """What a processor of transformers is: canvases, or videos, and questions to what the model takes, and answers back to words.

    Attributes:
        prompt: the text before the answer, of a question.
        pixels: what the tower reads of the canvases.
        text_of: the words of an answer.
    """

    prompt: Callable[[str], list[int]] = prompt
    pixels: Callable[[Tensor], Tensor] = tiles
    text_of: Callable[[Tensor], str] = text_of

    def __call__(self, images: Tensor, text: list[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        """
        Args:
            images: ``(texts, 1, 48, 48)``, of videos ``(texts, 6, 1, 24, 24)``; text: one question for each.
        """
        rows = [self.prompt(question) for question in text]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": self.pixels(images)}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return [self.text_of(row[row > IMAGE] if skip_special_tokens else row) for row in ids]
