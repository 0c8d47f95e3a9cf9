"""A mixture made of dense models that were trained apart: their MLPs and their attentions become experts (BAM)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accelpass.api.growing.mixtures import AttentionExperts, MlpExperts
from accelpass.ir.errors import AccelpassError, OptionError

FORMS = ("expert_kv", "shared_kv")
_HEADS, _KV = ("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "v_proj", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Upcycled:
    """A mixture, and where its parameters come from, by path in it.

    Attributes:
        copied: of one dense model each; of MLPs, all stacked in one.
        averaged: means over the dense models.
        created: routers, which are random.
    """

    model: nn.Module
    copied: tuple[str, ...]
    averaged: tuple[str, ...]
    created: tuple[str, ...]


def upcycle(models: Sequence[nn.Module], attention: str = "expert_kv", top_k: int = 1, seed: int = 0) -> Upcycled:
    """Make a mixture of experts of dense models that were trained apart from one seed: where its training begins.

    After Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts" (arXiv 2408.08274): MLPs
    and attentions become experts, all else is the mean, and routers are random. Every token goes through all attentions and ``top_k``
    MLPs. The paper's blocks are parallel, both reading one norm; sequential ones keep their two norms (inferred). It is a method of
    quality, for a model that is trained afterwards: the mixture is slower than a dense model, and with ``top_k`` below the number of models it
    is not the dense model even of equal ones, as the gates kept do not sum to 1.

    Args:
        models: at least two, of one architecture, of which the first one's settings are taken; they are not changed.
        attention: ``expert_kv``: each attention keeps its keys and values, and a cache holds all of them. ``config.num_hidden_layers``
            counts these. ``shared_kv``: all read keys and values of one projection, the mean (inferred).
        top_k: MLPs that each token goes through.
        seed: of the routers, ``N(0, initializer_range)`` (inferred).

    Raises:
        OptionError: an option out of range.
        AccelpassError: fewer than two models, models that differ in form, or no blocks of a known form.
    """
    if attention not in FORMS:
        raise OptionError(f"upcycle: attention={attention!r} is not known; use {' or '.join(FORMS)}")
    if len(models) < 2:
        raise AccelpassError(f"upcycle: a mixture needs two models or more; {len(models)} given")
    if not 1 <= top_k <= len(models):
        raise OptionError(f"upcycle: top_k={top_k!r} is not supported; use 1 to {len(models)}, the number of models")
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in models]
    for number, other in enumerate(shapes[1:], 1):
        odd = sorted(n for n in shapes[0].keys() | other.keys() if shapes[0].get(n) != other.get(n))
        if odd:
            raise AccelpassError(
                f"upcycle: model {number} is of another form than the first: {odd[0]} is {_said(other, odd[0])}, not "
                f"{_said(shapes[0], odd[0])}. Branch all from one seed"
            )
    made: Any = copy.deepcopy(models[0])
    attentions, mlps = [*_having(made, _HEADS)], [*_having(made, (*_MLP, "act_fn"))]
    if not attentions or len(attentions) != len(mlps):
        raise AccelpassError(
            f"upcycle: {len(attentions)} attentions ({', '.join(_HEADS)}) and {len(mlps)} gated MLPs ({', '.join(_MLP)}) without "
            "biases were found; it takes models that have one of each in a block"
        )
    with torch.no_grad():
        experts = tuple(f"{path}." for path, _ in (*attentions, *mlps))
        averaged = _averaged(made, models, [n for n, _ in made.named_parameters() if not n.startswith(experts)])
        _attentions(made, models, [path for path, _ in attentions], attention == "shared_kv")
    for path, mlp in mlps:
        made.set_submodule(path, MlpExperts([m.get_submodule(path) for m in models], top_k).to(mlp.down_proj.weight))
    spread = float(getattr(getattr(made, "config", None), "initializer_range", 0.02))
    draw, created = torch.Generator().manual_seed(seed), []
    for path, module in made.named_modules():
        if isinstance(module, AttentionExperts | MlpExperts):
            weight = module.router.weight
            module.train(made.training)
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * spread)
            created.append(f"{path}.router.weight")
    if attention == "shared_kv":
        of = [f"{path}.experts.0.{name}." for path, _ in attentions for name in _KV]
        averaged += [name for name, _ in made.named_parameters() if name.startswith(tuple(of))]
    rest = [name for name, _ in made.named_parameters() if name not in {*averaged, *created}]
    return Upcycled(made, tuple(rest), tuple(averaged), tuple(created))


def _having(model: nn.Module, parts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Modules that have all these parts, whose linears are plain."""
    for path, module in model.named_modules():
        held = [getattr(module, part, None) for part in parts]
        biased = "gate_proj" in parts and any(getattr(h, "bias", None) is not None for h in held)
        if path and all(h is not None for h in held) and not biased:
            yield path, module


def _averaged(made: nn.Module, models: Sequence[nn.Module], paths: list[str]) -> list[str]:
    """Let parameters be the mean over models; returns their paths."""
    for path in paths:
        own = made.get_parameter(path)
        own.copy_(torch.stack([m.get_parameter(path).float().to(own.device) for m in models]).mean(0))
    return paths


def _attentions(made: Any, models: Sequence[nn.Module], paths: Sequence[str], shared: bool) -> None:
    """Put the attentions of all models in the place of those of one."""
    for path in paths:
        experts: list[Any] = [copy.deepcopy(m.get_submodule(path)) for m in models]
        for number, expert in enumerate(experts):
            if shared:
                for name in _KV:
                    if hasattr(expert, name):
                        setattr(expert, name, getattr(experts[0], name))
            elif hasattr(expert, "layer_idx"):
                expert.layer_idx += number * len(paths)  # a place of its own in a cache
        if shared:
            alike = [n for n, _ in experts[0].named_parameters() if n.partition(".")[0] in _KV]
            _averaged(experts[0], [m.get_submodule(path) for m in models], alike)
        weight = experts[0].q_proj.weight
        made.set_submodule(path, AttentionExperts(experts, weight.shape[1], shared).to(weight))
    config = getattr(made, "config", None)
    if config is not None and not shared:
        config.num_hidden_layers = len(paths) * len(models)
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types) * len(models)


def _said(shapes: dict[str, torch.Size], name: str) -> str:
    return f"{list(shapes[name])}" if name in shapes else "missing"
