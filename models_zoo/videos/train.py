"""Trains the model of videos from that of canvases: ``python -m accelpass.models_zoo.videos.train``; about 25 minutes on one core.

The tower stays as it is; projector and language model learn to answer. In the second half of the steps a random share of each frame's
patches is shown, as for canvases. The weights beside this were made in 1,000 steps, with one more question for each video (which digit
moves), which was not learnt and is no longer asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from accelpass.models_zoo.canvases.train import Task, accuracy, save, train_text
from accelpass.models_zoo.videos import questions
from accelpass.models_zoo.videos.model import FILE, llava

VIDEOS = Task(
    questions.videos,
    questions.frames,
    questions.prompt,
    questions.ids_of,
    {"which": slice(questions.FRAMES), "how many": slice(questions.FRAMES, None)},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the largest learning rate")
    parser.add_argument("--go-on", action="store_true", help="with the model that is there")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = llava(trained=given.go_on)
    train_text(model, given.steps, generator, given.out, VIDEOS, given.rate)
    save(model, given.out)
    print(accuracy(model, 512, generator, VIDEOS))


if __name__ == "__main__":
    main()
