"""What commands of the command line begin with: options that are checked, and a model that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelpass.cli.options import Dtype, Lowering
from accelpass.cli.terminal import UsageMistake


def options_of(passes: list[str] | None, lowering: Lowering) -> dict[str, Any]:
    """The options, checked before a model is loaded for them."""
    from accelpass.cli.arguments import passes_from
    from accelpass.passes.core.options import parse

    chosen = passes_from(passes or [])
    options: dict[str, Any] = {"lowering": lowering.value}
    if chosen is not None:
        options["passes"] = chosen
    parse(options)
    return options


def load(name: str, device: str, dtype: Dtype, generates: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer (None if it has none).

    Args:
        generates: whether the command needs a model that makes text.

    Raises:
        UsageMistake: there is no such device, or the model is not one that the command takes.
    """
    import torch

    from accelpass.models_zoo import ZOO, resolve

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageMistake("--device cuda: torch sees no GPU; leave --device out for the CPU")
    if name in ZOO and ZOO[name].task == "image":
        raise UsageMistake(f"{name} makes images; accelpass sample {name} and accelpass search-steps {name} take it")
    model, tokenizer = resolve(name, getattr(torch, dtype.value))
    if generates and not makes_text(model):
        raise UsageMistake(f"{name} does not generate text; 'accelpass explain {name}' takes it")
    return model.to(device), tokenizer


def load_checkpoint(name: str, dtype: Dtype) -> tuple[Any, Any, Any]:
    """The model of a quantized checkpoint with its numbers, its tokenizer (None if it has none), and the plan with its codes."""
    import torch

    from accelpass.api.prequantized import quantized_plan
    from accelpass.checkpoints.building import built

    path = Path(name).expanduser()
    model, tokenizer = built(path, getattr(torch, dtype.value))
    return model, tokenizer, quantized_plan(model, path)


def makes_text(model: Any) -> bool:
    """Whether transformers can generate with it."""
    can: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    return can()
