"""Tower and text of a vision-language model in one graph, also where ``generate`` of transformers calls it."""

from __future__ import annotations

import os
from typing import TypeVar

from torch import nn

from accelpass.ir.errors import AccelpassError
from accelpass.ir.torch_private import read_images_in_forward

Model = TypeVar("Model", bound=nn.Module)


def one_graph(model: Model) -> Model:
    """Let a vision-language model of transformers run its tower inside its own call, where passes see tower and text together.

    ``generate`` runs the tower by itself, uncompiled, and transformers counts image tokens on the host, which breaks a graph. After
    this call ``generate`` hands the pixels to the model, and that count is left out: in the whole process, by
    ``TRANSFORMERS_DISABLE_TORCH_CHECK=1``. Passes that shorten a text count for themselves. Call it before the model is compiled.

    Args:
        model: with ``forward(input_ids, pixel_values, ...)``, as ``AutoModelForImageTextToText`` loads it. It is changed.

    Returns:
        The same model.

    Raises:
        AccelpassError: it does not read images with a text.
    """
    if not read_images_in_forward(model):
        raise AccelpassError(
            f"{type(model).__name__} is no model of transformers that reads images with a text (one with get_image_features); "
            "give the whole model, before torch.compile wraps it"
        )
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    return model
