"""Short videos of handwritten digits, questions about them, and the words of both.

A video has six frames of 24 x 24 pixels. Two or three of scikit-learn's digits (enlarged to 16 x 16) follow each other, each for two frames
or more; one of them moves from frame to frame, the others stand still. Every frame has noise of its own, as a camera's has. What
frames show is asked, not what moves: a model of this size did not learn to tell that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.models_zoo import digits
from accelpass.models_zoo.canvases import questions
from accelpass.models_zoo.canvases.questions import CELL, IMAGE, NUMBERS, PATCHES, PLURALS, START, Asked, specimens

FRAMES = 6
WORDS = [*questions.WORDS, "frame", "in", "frames", "show"]
"""Those of canvases, then others."""
_VOCABULARY = questions.Vocabulary(WORDS)
ids_of, text_of = _VOCABULARY.ids_of, _VOCABULARY.text_of
_LENGTHS = ((2, 4), (3, 3), (4, 2), (2, 2, 2))
_NOISE, _ROOM = 0.05, CELL - digits.CELL
ASKED = FRAMES + 2


def videos(count: int, held_out: bool, generator: torch.Generator) -> Asked:
    """Videos ``(count, 6, 1, 24, 24)`` of specimens that are held out of training, or of the others.

    Questions of each, :data:`ASKED`: which digit a frame shows, of each frame; how many frames show a digit, twice.
    """
    cells, labels = specimens(held_out)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    shown = torch.full((count, FRAMES, 1, CELL, CELL), -1.0)
    asking, answers = [], []
    for video in range(count):
        lengths = _LENGTHS[int(draw(len(_LENGTHS)))]
        classes = torch.randperm(digits.CLASSES, generator=generator)[: len(lengths)].tolist()
        moving, frame = int(draw(len(lengths))), 0
        row: list[int] = []
        for number, (length, digit) in enumerate(zip(lengths, classes, strict=True)):
            pool = (labels == digit).nonzero().flatten()
            image = cells[pool[draw(len(pool))]]
            place = draw(_ROOM + 1, 2)
            for _ in range(length):
                down, right = place.tolist()
                shown[video, frame, :, down : down + digits.CELL, right : right + digits.CELL] = image
                if number == moving:
                    place = (place + 2 + draw(_ROOM - 3, 2)) % (_ROOM + 1)  # by two pixels or more
                row.append(digit)
                frame += 1
        other = int(draw(digits.CLASSES))
        counted = [(digit, row.count(digit)) for digit in (row[int(draw(FRAMES))], other)]
        asking.append(
            [f"which digit is in frame {NUMBERS[frame + 1]} ?" for frame in range(FRAMES)]
            + [f"how many frames show {PLURALS[digit]} ?" for digit, _ in counted]
        )
        answers.append([NUMBERS[n] for n in [*row, *(number for _, number in counted)]])
    noise = torch.randn(shown.shape, generator=generator)
    return Asked(shown + _NOISE * noise, asking, answers)


def frames(video: Tensor) -> Tensor:
    """What the tower reads of videos ``(n, 6, 1, 24, 24)``: ``(6 n, 1, 24, 24)``."""
    return video.flatten(0, 1)


def prompt(question: str, patches: int = PATCHES) -> list[int]:
    """The text before the answer, with a place for each patch of a frame."""
    return prompt_of(question, dict.fromkeys(range(FRAMES), patches))


def prompt_of(question: str, places: dict[int, int]) -> list[int]:
    """The text of some frames, with so many places for each, by its number from 0."""
    ids = [START]
    for frame, count in places.items():
        ids += [*ids_of(f"frame {NUMBERS[frame + 1]}"), *[IMAGE] * count]
    return ids + ids_of(question)


processor = questions.Processor(prompt, frames, text_of)
