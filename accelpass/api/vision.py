"""Tower and text of a vision-language model in one graph, also where ``generate`` of transformers calls it."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accelpass.ir.errors import AccelpassError
from accelpass.ir.known_values_private import add_by_mask, frames_of_its_own, read_images_in_forward, values_known

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

    Models whose texts may have a different number of images (Idefics3, SmolVLM) get them filled up with images of zeros. Which ones are
    real is read on the host, before the model's call, so that there is a graph for each number of images.

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
    add_by_mask(model)
    signature = inspect.signature(type(model).forward)
    base: Any = model.base_model
    fills = "pixel_attention_mask" in signature.parameters and all(
        hasattr(base, n) for n in ("vision_model", "connector")
    )
    if fills:
        base.get_image_features = functools.partial(_features_of_real_images, base)
    if fills or any(name.endswith(_SIZES) for name in signature.parameters):
        reads: Any = functools.partial(_sizes_read, model)
        reads.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        model.forward = reads  # a partial, so that a copy of the model has one of its own
    return model


@frames_of_its_own
def _sizes_read(model: nn.Module, *args: Any, **given: Any) -> Any:
    """The model's call, with the sizes of images read beforehand; Dynamo does not trace this, and compiles what it calls."""
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **given}
    sizes, real, others = _told(given, "get_image_features" in vars(model.base_model))
    with values_known():
        return _with_sizes(model, sizes, real, others)


@torch.compiler.disable
def _told(given: dict[str, Any], fills: bool) -> tuple[dict[str, Size], str, dict[str, Any]]:
    """Sizes as texts; of a model that fills up with images of zeros, the numbers of the others, if there are any; and the other arguments."""
    sizes: dict[str, Size] = {}
    for name, x in given.items():
        if name.endswith(_SIZES) and isinstance(x, Tensor) and not x.is_floating_point():
            sizes[name] = ",".join(map(str, x.flatten().tolist())), tuple(x.shape), x.dtype, x.device
    others = {name: x for name, x in given.items() if name not in sizes}
    real, pixels, mask = "", given.get("pixel_values"), given.get("pixel_attention_mask")
    if fills and isinstance(pixels, Tensor):
        shown = (pixels != 0).flatten(2).any(-1).flatten()
        if not bool(shown.all()):
            real = ",".join(map(str, shown.nonzero().flatten().tolist())) or "0"  # the tower wants one
        # Images without padding: attention needs no mask.
        if mask is not None and bool(mask.flatten(0, 1)[shown].all()):
            others["pixel_attention_mask"] = None
    return sizes, real, others


def _with_sizes(
    self: nn.Module,
    sizes: dict[str, Size],
    real: str,
    given: dict[str, Any],
) -> Any:
    """The model's call with sizes that are constants: Dynamo holds a text for one, and a number, the second time, for a variable."""
    made = {
        name: torch.tensor([int(n) for n in text.split(",")], dtype=dtype, device=device).view(shape)
        for name, (text, shape, dtype, device) in sizes.items()
    }
    if real:
        rows = [int(n) for n in real.split(",")]
        for name in ("pixel_values", "pixel_attention_mask"):
            if isinstance(given.get(name), Tensor):
                made[name] = given[name].flatten(0, 1)[rows].unsqueeze(0)
    return type(self).forward(self, **{**given, **made})


def _features_of_real_images(
    self: Any, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **given: Any
) -> Any:
    """What ``get_image_features`` of Idefics3 and SmolVLM gives where every image is real: how many there are is known."""
    if not torch.compiler.is_compiling():
        return type(self).get_image_features(self, pixel_values, pixel_attention_mask, **given)
    images, size = pixel_values.to(self.dtype).flatten(0, 1), self.config.vision_config.patch_size
    if pixel_attention_mask is None:
        seen = torch.ones(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)
    else:
        seen = pixel_attention_mask.flatten(0, 1).bool()
    seen = seen.unfold(1, size, size).unfold(2, size, size).flatten(3).any(-1)
    outputs = self.vision_model(pixel_values=images, patch_attention_mask=seen, **{**given, "return_dict": True})
    outputs.pooler_output = [self.connector(outputs.last_hidden_state).flatten(0, 1)]
    return outputs
