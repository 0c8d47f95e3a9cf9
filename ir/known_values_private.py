"""What Dynamo knows of images' sizes while it traces a model of transformers: private names of torch and of transformers for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, _numpy, nn
from torch._ops import OpOverload
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from accelpass.ir.core.graph import aten

__all__ = ["add_by_mask", "frames_of_its_own", "read_images_in_forward", "values_known"]

numpy_prod: Any = vars(_numpy)["prod"]
_known, _known_lock = list[Any](), threading.Lock()
_LARGEST_KNOWN = 1 << 16
_EMPTY = (aten.new_empty.default, aten.new_empty_strided.default, aten.empty_like.default)
_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def frames_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo leave a function as it is, and compile what it calls."""
    made: Callable[..., Any] = torch._disable_dynamo(function, recursive=False)
    return made


@contextmanager
def values_known() -> Iterator[None]:
    """Within it Dynamo knows the values of tensors that are computed from constants alone, up to 65,536 elements (else: one).

    It reads them where a model does (``tolist``, sizes of parts, ``np.prod`` of a shape) and need not break the graph. Constants are what
    ``torch.tensor`` and ``torch.arange`` make of numbers. Calls of several threads may overlap.
    """
    # A result that was kept while values were not known has none.
    options = {"capture_scalar_outputs": True, "fake_tensor_cache_enabled": False}
    with _known_lock:
        if not _known:
            patched = torch._dynamo.config.patch(options)
            patched.__enter__()
            _known.append((patched, fake_tensor.CONSTANT_NUMEL_LIMIT))
            _fold_products(True)
            for empty in _EMPTY:  # of a tensor that is known; what stands in the new one is not
                empty._tags = [*empty._tags, torch.Tag.nondeterministic_seeded]
            fake_tensor.CONSTANT_NUMEL_LIMIT = _LARGEST_KNOWN
            fake_impls.op_implementations_dict.update(dict.fromkeys(_COUNTS, _count))
        _known.append(None)
    try:
        yield
    finally:
        with _known_lock:
            _known.pop()
            if len(_known) == 1:
                patched, fake_tensor.CONSTANT_NUMEL_LIMIT = _known.pop()
                for function in _COUNTS:
                    fake_impls.op_implementations_dict.pop(function, None)
                _fold_products(False)
                for empty in _EMPTY:
                    empty._tags = [tag for tag in empty._tags if tag != torch.Tag.nondeterministic_seeded]
                patched.__exit__(None, None, None)


def _count(mode: FakeTensorMode, function: OpOverload, *args: Any, **kwargs: Any) -> FakeTensor:
    """An ``arange`` of numbers, whose values are known."""
    symbols = any(isinstance(x, torch.SymInt | torch.SymFloat) for x in (*args, *kwargs.values()))
    made = fake_impls.constructors(mode, function, *args, **kwargs)
    if symbols or made.numel() > _LARGEST_KNOWN:
        return made
    known: FakeTensor = mode.fake_tensor_converter.from_real_tensor(mode, function(*args, **kwargs), make_constant=True)
    return known


@torch.compiler.disable
def _fold_products(folds: bool) -> None:
    """Let Dynamo compute ``np.prod`` of numbers, which it takes for a tensor otherwise, or no longer."""
    from torch._dynamo.variables import builder, misc  # seconds

    variable: Any = misc.NumpyVariable
    handlers = cast(Any, builder.SourcelessBuilder)._type_handlers
    if folds:
        variable.constant_fold_functions = (*variable.constant_fold_functions, numpy_prod)
        handlers[np.int64] = lambda tx, value: builder.ConstantVariable.create(int(value))
    else:
        variable.constant_fold_functions = tuple(f for f in variable.constant_fold_functions if f is not numpy_prod)
        del handlers[np.int64]


def read_images_in_forward(model: nn.Module) -> bool:
    """Let ``generate`` of transformers hand images to the model, not to its tower alone; False if the model reads none.

    ``generate`` runs the tower by itself where the model says that it takes what a tower gives (since 5.20 or so). Hooks that
    collect hidden states are installed at the first call otherwise, which a compiled call cannot do.
    """
    base = getattr(model, "base_model", None)
    if not callable(getattr(base, "get_image_features", None)):
        return False
    if hasattr(model, "_supports_mm_encoder_outputs"):
        object.__setattr__(model, "_supports_mm_encoder_outputs", _no)
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    # A tower that was called before has its hooks, and would get them once more with the whole model's.
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[number]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)
    return True


def add_by_mask(model: nn.Module) -> None:
    """Let text layers that add features of inner vision blocks (Qwen3-VL's) do so in a graph of fixed shapes."""
    for module in model.modules():
        if callable(getattr(module, "_deepstack_process", None)):
            object.__setattr__(module, "_deepstack_process", _added)


def _added(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """The stream, and at the places of the mask the features; a place has no number, which only a call would show."""
    features, places = visual_embeds.to(hidden_states), visual_pos_masks.to(hidden_states.device).unsqueeze(-1)
    empty = torch.zeros(hidden_states.shape, dtype=features.dtype, device=features.device)  # no part of the stream
    return hidden_states + empty.masked_scatter(places, features)


def _no() -> bool:
    """A function of a module, so that a model that holds it can be copied and pickled."""
    return False
