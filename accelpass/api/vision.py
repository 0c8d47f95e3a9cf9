"""Tower and text of a vision-language model in one graph, also where ``generate`` of transformers calls it."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accelpass.ir.errors import AccelpassError
from accelpass.ir.torch_private import frames_of_its_own, read_images_in_forward, values_known

Model = TypeVar("Model", bound=nn.Module)
_SIZES = ("_thw", "_hws", "_sizes", "_shapes")
"""How transformers calls arguments that say how large images are, in numbers that its models read on the host."""

Size = tuple[str, tuple[int, ...], torch.dtype, torch.device]
"""A tensor of sizes: its numbers, and what it is made of."""


def one_graph(model: Model) -> Model:
    """Let a vision-language model of transformers run its tower inside its own call, where passes see tower and text together.

    ``generate`` runs the tower by itself, uncompiled, and transformers counts image tokens on the host, which breaks a graph. After
    this call ``generate`` hands the pixels to the model, and that count is left out: in the whole process, by
    ``TRANSFORMERS_DISABLE_TORCH_CHECK=1``. Passes that shorten a text count for themselves. Call it before the model is compiled.

    Models that read images of many sizes (Pixtral, LLaVA-NeXT, Qwen2-VL and later) read these sizes (``image_grid_thw``, ``image_sizes``,
    ...) on the host. They become constants of the graph, so that there is a graph for each set of sizes: let a processor resize images
    to a few. Give such models sizes, and Qwen's ``position_ids``, as ``generate`` does, by name.

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
    signature = inspect.signature(type(model).forward)
    if any(name.endswith(_SIZES) for name in signature.parameters):
        reads: Any = functools.partial(_sizes_read, model)
        reads.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        model.forward = reads  # a partial, so that a copy of the model has one of its own
    return model


@frames_of_its_own
def _sizes_read(model: nn.Module, *args: Any, **given: Any) -> Any:
    """The model's call, with the sizes of images read beforehand; Dynamo does not trace this, and compiles what it calls."""
    sizes, others = _told(given)
    with values_known():
        return _with_sizes(model, sizes, args, others)


@torch.compiler.disable
def _told(given: dict[str, Any]) -> tuple[dict[str, Size], dict[str, Any]]:
    """Sizes as texts, and the other arguments."""
    sizes: dict[str, Size] = {}
    for name, x in given.items():
        if name.endswith(_SIZES) and isinstance(x, Tensor) and not x.is_floating_point():
            sizes[name] = ",".join(map(str, x.flatten().tolist())), tuple(x.shape), x.dtype, x.device
    return sizes, {name: x for name, x in given.items() if name not in sizes}


def _with_sizes(
    self: nn.Module,
    sizes: dict[str, Size],
    args: tuple[Any, ...],
    given: dict[str, Any],
) -> Any:
    """The model's call with sizes that are constants: Dynamo holds a text for one, and a number, the second time, for a variable."""
    made = {
        name: torch.tensor([int(n) for n in text.split(",")], dtype=dtype, device=device).view(shape)
        for name, (text, shape, dtype, device) in sizes.items()
    }
    return type(self).forward(self, *args, **given, **made)
