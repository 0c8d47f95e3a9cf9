"""The LLaVA of canvases with more words: an image model that reads the frames of a video one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accelpass.models_zoo.canvases import model as canvases
from accelpass.models_zoo.canvases.questions import Processor
from accelpass.models_zoo.packaged import read_half
from accelpass.models_zoo.videos.questions import WORDS, processor

FILE = Path(__file__).parents[1] / "weights" / "videos_llava.safetensors"


def llava(trained: bool = True) -> Any:
    """The model, in eval mode; untrained it is that of canvases, whose new words are drawn at random.

    Raises:
        ZooError: its weights are not there; says how to make them.
    """
    model = canvases.llava()
    model.resize_token_embeddings(len(WORDS), mean_resizing=False)
    if trained:
        read_half(model, FILE, "accelpass.models_zoo.videos.train")
    return model.eval()


def load(dtype: torch.dtype) -> tuple[Any, Processor]:
    """The model and its processor."""
    return llava().to(dtype), processor
