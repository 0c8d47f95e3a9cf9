"""Tiny random models, one of every architecture family that the installed transformers and diffusers know.

They answer nothing; they are there so that a pass can be run on how every family *writes* its layers. Weights are
seeded, and no parameter is left at zero: an architecture that starts as the identity (a DiT's gates, a zero output
projection) would otherwise hide a broken attention.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from accelpass.models_zoo import tiny_diffusers
from accelpass.models_zoo.tiny_overrides import INPUTS, OVERRIDES, UNBUILDABLE, image_size
from accelpass.models_zoo.tiny_shrink import WEIGHT_STD, shrunk

KINDS = ("causal_lm", "masked_lm", "image", "diffusion")
BATCH, TOKENS = 2, 12
_FIRST_WORD = 16  # Smaller ids are special tokens (padding, image slots) in the tiny configurations.
_MOST_PARAMETERS = 20_000_000
_MAPPINGS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


class TinyError(ValueError):
    """A family that has no tiny build; the message is the reason."""


@dataclass(frozen=True)
class Build:
    """A model in eval mode, and example inputs for ``model(**kwargs)``."""

    model: torch.nn.Module
    kwargs: dict[str, Any]


@dataclass(frozen=True, order=True)
class Family:
    """``name`` is transformers' model type ("llama"), ``kind`` one of KINDS: bert is in two kinds."""

    name: str
    kind: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def unbuildable(self) -> str | None:
        """Why this family has no tiny build, or None if it has one."""
        return UNBUILDABLE.get(self.key)

    def build(self) -> Build:
        if self.unbuildable:
            raise TinyError(f"{self.key} has no tiny build: {self.unbuildable}")
        with _seeded(), _quiet(), _poisoned_memory():
            if self.kind == "diffusion":
                model, kwargs = tiny_diffusers.build(self.name)
            else:
                model = _language_or_image_model(self)
                kwargs = _inputs(self, model)
            _fill_degenerate(model)
        return Build(model.eval().float(), kwargs)


def families() -> list[Family]:
    """Every family, sorted by kind and name, those that cannot be built included (see ``Family.unbuildable``)."""
    from transformers.models.auto import modeling_auto

    found = [Family(name, "diffusion") for name in tiny_diffusers.NAMES]
    for kind, mapping in _MAPPINGS.items():
        found += [Family(name, kind) for name in getattr(modeling_auto, mapping)]
    return sorted(found, key=lambda family: (KINDS.index(family.kind), family.name))


def family(key: str) -> Family:
    """The family with this key, such as "causal_lm/llama"."""
    kind, _, name = key.partition("/")
    wanted = Family(name, kind)
    if wanted not in families():
        raise TinyError(f"no family {key!r}; a key is KIND/NAME with KIND one of {', '.join(KINDS)}")
    return wanted


def _language_or_image_model(family: Family) -> torch.nn.Module:
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    class_name = getattr(modeling_auto, _MAPPINGS[family.kind])[family.name]
    # Several heads for one family (with and without a teacher): the first is the plain one.
    model_class = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])
    config_class = model_class.config_class or configuration_auto.CONFIG_MAPPING[family.name]
    overrides = OVERRIDES.get(family.key, OVERRIDES.get(family.name, {}))
    config = shrunk(config_class, overrides)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    if family.kind == "causal_lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True  # An encoder's language-model head would attend to the future otherwise.
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > _MOST_PARAMETERS:
        raise TinyError(f"{family.key} was not made tiny: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return model_class(config)


def _inputs(family: Family, model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    make = INPUTS.get(family.key, INPUTS.get(family.name))
    if make is not None:
        return make(config)
    if family.kind == "image":
        size = image_size(family.name)
        return {"pixel_values": torch.randn(BATCH, 3, size, size)}
    vocab = config.get_text_config().vocab_size
    return {"input_ids": torch.randint(_FIRST_WORD, vocab, (BATCH, TOKENS))}


def _fill_degenerate(model: torch.nn.Module) -> None:
    """Give values to what was never set (NaN, by _poisoned_memory) and noise to what is zero everywhere."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        with torch.no_grad():
            if not torch.isfinite(tensor).all() and not _is_mask(tensor):
                tensor.normal_(0.0, WEIGHT_STD)
            elif isinstance(tensor, torch.nn.Parameter) and not tensor.any():
                # Biases less than weights, so that they do not drown a signal of the same width.
                tensor.normal_(0.0, WEIGHT_STD if tensor.dim() > 1 else WEIGHT_STD / 5)


def _is_mask(tensor: torch.Tensor) -> bool:
    return bool(torch.isinf(tensor).any()) and not bool(torch.isnan(tensor).any())


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs and warns about tiny configurations (a missing pad token, a legacy default)."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN in here. Some families leave a parameter uninitialised, which is whatever the memory
    held: a model that differs from run to run."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
