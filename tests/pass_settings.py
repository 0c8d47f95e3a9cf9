"""Options at which each registered pass does its work on the kit's small models, for the conformance kit and the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.registry import registered
from accelpass.passes.quantization.prequantized import Stored
from accelpass.passes.step_cache.tokencache import IMPORTANCE
from accelpass.passes.structure.shortgpt import INFLUENCE
from accelpass.testing.subjects import TIMES
from accelpass.testing.trial import Trial

_BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
_TOKENS = 16
LAST = "the last tokens of a prompt choose what the others read"
"""Why outputs of earlier tokens depend on later ones."""
HEADS = "all tokens of a prompt choose the heads of later layers"
CROWD = "an expert's places go to first choices before second ones, whoever stands earlier"


@dataclass(frozen=True)
class Setting:
    """How a pass is tried.

    Attributes:
        options: at which it works on models of 24 tokens.
        models: that it is for; the decoder is the slowest, so it stands alone where nothing else is needed.
        identity: in place of the one that the class declares, where that one leaves nothing to compile.
        tensors: of a plan.
        looks_ahead, recompiles: see :func:`accelpass.testing.check_pass`.
        tolerance: that a method with a product of many terms between it and the dense model needs.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("decoder",)
    identity: Mapping[str, Any] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    looks_ahead: str | None = None
    recompiles: int = 0
    tolerance: float = 1e-4

    def trial(self, name: str, **more: Any) -> Trial:
        return Trial.of(name, self.options, self.identity, tensors=dict(self.tensors), **more)


def _table() -> Tensor:
    """Importances by block, step and token, all different."""
    return torch.rand(len(_BLOCKS), len(TIMES), _TOKENS, generator=torch.Generator().manual_seed(0))


def _norms() -> dict[str, Tensor]:
    """Of what the decoder's MLPs and output projections read, all different."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"mlp.act": 64, "self_attn.heads": 32}
    return {f"wanda/model.layers.{n}.{at}": torch.rand(s, generator=draw) for n in (0, 1) for at, s in sizes.items()}


def _masks() -> dict[str, Tensor]:
    """Of the decoder's channels and groups of heads: half of them noise."""
    sizes = {"mlp.act": 64, "self_attn.heads": 2}
    return {
        f"vtrans/model.layers.{n}.{at}": torch.stack(
            [torch.linspace(0.5, 1.5, s), torch.where(torch.arange(s) % 2 < 1, -9.0, 3.0)]
        )
        for n in (0, 1)
        for at, s in sizes.items()
    }


def _small_parts() -> dict[str, Tensor]:
    """Of the decoder's MLPs: feed-forward layers of 4 channels, and routers."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"up": (4, 32), "gate": (4, 32), "down": (32, 4), "bias": (32,), "router": (2, 32)}
    paths = [(f"duo_llm/model.layers.{n}.mlp/{name}", size) for n in (0, 1) for name, size in sizes.items()]
    return {path: torch.randn(size, generator=draw) / 4 for path, size in paths}


def _factors(name: str) -> dict[str, Tensor]:
    """Of the channels that the linears of the kit's models read; those that read one input have the same."""
    inputs = {
        ("layers.{}.gate_proj", "layers.{}.up_proj"): 64,
        ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"): 32,
        (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ): 32,
        ("encoder.layer.{}.output.dense",): 64,
    }
    draw = torch.Generator().manual_seed(0)
    each = [(paths, n, torch.rand(size, generator=draw) + 0.5) for paths, size in inputs.items() for n in (0, 1)]
    return {f"{name}/{path.format(n)}.weight/factors": factors for paths, n, factors in each for path in paths}


def _ranges(name: str) -> dict[str, Tensor]:
    """Of the inputs of all linears of the kit's models."""
    weights = ("{}.gate_proj", "{}.up_proj", "{}.down_proj")
    paths = [f"layers.{w}" for w in weights]
    inside = (*(f"{{}}.self_attn.{x}_proj" for x in "qkvo"), *(w.replace("{}", "{}.mlp") for w in weights))
    paths += [f"model.layers.{w}" for w in inside]
    return {f"{name}/{p.format(n)}.weight/range": torch.tensor([8.0]) for p in paths for n in (0, 1)}


def _heads() -> dict[str, Tensor]:
    """Of the decoder's layers: rankings of their query heads, and the error that eviction makes."""
    of = {"heads": torch.tensor([2, 0, 3, 1]), "error": torch.tensor(0.5, dtype=torch.float64)}
    return {f"compresskv/model.layers.{n}.self_attn/{part}": t for n in (0, 1) for part, t in of.items()}


def _linear() -> dict[str, Tensor]:
    """Of the decoder's layers: weights of linear attention that imitate nothing."""
    draw = torch.Generator().manual_seed(0)
    sizes = {
        "conv_q": (4, 8, 4),
        "conv_k": (2, 8, 4),
        "map_q": (4, 8, 4),
        "map_k": (2, 8, 4),
        "gate": (2, 8),
        "bias": (2,),
    }
    paths = [(f"lawcat/model.layers.{n}.self_attn/{name}", size) for n in (0, 1) for name, size in sizes.items()]
    return {path: torch.randn(size, generator=draw) / 2 for path, size in paths}


def _codes() -> dict[str, Tensor]:
    """Of some weights of the kit's models, which the codes stand for whatever they are."""
    draw, spec = torch.Generator().manual_seed(0), LinearSpec(Int8())
    sizes = {"layers.{}.gate_proj": (96, 64), "model.layers.{}.mlp.gate_proj": (64, 32)}
    found: dict[str, Tensor] = {}
    for path, size in sizes.items():
        for n in (0, 1):
            packed = spec.weight.pack(torch.randn(size, generator=draw) / 8)
            found |= Stored(spec, packed).artefacts(f"{path.format(n)}.weight")
    return found


_TOKENCACHE = {
    "paths": _BLOCKS, "timesteps": TIMES, "latents": (4, 8, 8), "intervals": (2, 2), "blocks": 1.0, "rotation": 0,
}  # fmt: skip

SETTINGS: dict[str, Setting] = {
    "horizontal_fusion": Setting({"copy_weights": True}, ("mlp", "prompt")),
    "cpu_decode_attention": Setting({}),
    "grouped_query": Setting({}, ("prompt",)),
    "cpu_gemv": Setting({}),
    "magnitude_prune": Setting({"heads": 0.5}, ("prompt", "decoder", "encoder")),
    "head_cascade": Setting({"keep": 0.1, "dense": 0.0}, ("encoder", "tower", "decoder"), looks_ahead=HEADS),
    "wanda": Setting({"heads": 0.5}, tensors=_norms()),
    "vtrans": Setting({"multiple": 8}, identity={"include": ()}, tensors=_masks()),
    "shortgpt": Setting({"remove": 1}, tensors={INFLUENCE: torch.tensor([0.9, 0.1])}),
    "vq_logits": Setting({"codes": 8}, ("prompt", "decoder")),
    "lexicon_head": Setting({"topk": 8}, ("lexicon",)),
    "moa_batch": Setting({"copy_weights": True}, ("attention_experts",), {"copy_weights": False}),
    "tutel_moe": Setting({"capacity_factor": 0.5}, ("experts",), looks_ahead=CROWD),
    "duo_llm": Setting({"route": "router"}, tensors=_small_parts()),
    "eep": Setting({"keep": (0, 1, 3)}, ("experts",)),
    "expert_pool": Setting({}, ("pooled",)),
    "vocabulary_prune": Setting({"keep": tuple(range(2, 40)), "unknown": 5}, ("prompt", "decoder")),
    "roll_loop": Setting(
        {"exit_eps": 0.05}, ("recurrent",), looks_ahead="a loop ends when the states of all tokens have settled"
    ),
    "nested_loop": Setting({}, ("recurrent",)),
    "skip_layers": Setting({"least": 1, "start": 24, "horizon": 25}),
    "early_exit": Setting({"threshold": 0.0}),
    "int8_weights": Setting({}, ("mlp", "prompt", "encoder")),
    "int8_dynamic": Setting({}, ("mlp", "prompt", "encoder")),
    "vidit_q": Setting({}, ("mlp", "prompt"), tensors=_factors("vidit_q")),
    "mixdq": Setting({}, ("mlp", "prompt"), tensors=_ranges("mixdq")),
    "int8_static": Setting({}, ("mlp", "prompt"), tensors=_ranges("int8_static")),
    "int4_weights": Setting({"group_size": 32}, ("mlp", "prompt")),
    "weight_format": Setting({"format": "mxfp4"}, ("mlp", "prompt")),
    "mixed_precision": Setting({"group_size": 32}, ("mlp", "prompt")),
    "prequantized": Setting({}, ("mlp", "prompt"), tensors=_codes()),
    "two_of_four": Setting({}, ("mlp", "prompt")),
    "hqq": Setting({"group_size": 32}, ("mlp", "prompt")),
    "gptq": Setting({"group_size": 32}, ("mlp", "prompt")),
    "awq": Setting({"group_size": 32}, ("mlp", "prompt"), tensors=_factors("awq")),
    "smoothquant": Setting({}, ("mlp", "prompt", "encoder"), tensors=_factors("smoothquant")),
    "h2o": Setting({"budget": 0.5}),
    "a2sf": Setting({"budget": 0.5}),
    "keyformer": Setting({"budget": 0.5}),
    "mikv": Setting({"budget": 0.5}),
    "zipvl": Setting({"threshold": 0.6, "newest": 4, "last": 4, "others": 4}),
    "kv_window": Setting({"budget": 0.5, "sinks": 2}),
    "kv_quant": Setting({"bits": 8}),
    "cskv": Setting({"keep_k": 0.5, "keep_v": 0.5, "window": 3}, tolerance=1e-3),
    "vidkv": Setting({"block": 4, "window": 8}),
    "lawcat": Setting({"features": 4}, tensors=_linear()),
    "compresskv": Setting({"tokens": 10, "window": 4}, tensors=_heads()),
    "tidaldecode": Setting({"budget": 6, "first": 0, "reselect": 1}),
    "tokenselect": Setting({"budget": 6, "sinks": 2, "newest": 4}),
    "value_pruning": Setting({"values": 8}, identity={"values": 63}),  # of 64 rows, most of them empty
    "progressive_keys": Setting({}),
    "pbs_attn": Setting({"block": 4, "segment": 8, "threshold": 0.5}, ("prompt", "decoder"), looks_ahead=LAST),
    "xattention": Setting({"block": 4, "stride": 2, "threshold": 0.5}, ("prompt", "decoder")),
    "minference": Setting(
        {"block": 4, "vertical": 3, "slash": 4, "first": 1, "local": 2}, ("prompt", "decoder"), looks_ahead=LAST
    ),
    "sink_window": Setting({"density": 0.5, "sinks": 4, "block": 4, "reserve": 8}, ("prompt", "decoder")),
    "moa": Setting({"alpha": 0.0, "beta": 0.5, "sinks": 4, "block": 4, "reserve": 8}, ("prompt", "decoder")),
    "tome": Setting({"merge": 3}, ("tower",)),
    "one_d_piece": Setting({"length": 5}, ("tokenizer",)),
    "visionzip": Setting({"keep": 0.5}, ("seeing",), looks_ahead=None),
    "hired": Setting({"keep": 0.5}, ("seeing",), looks_ahead=None),
    "stc": Setting({"keep": 0.5}, ("seeing",), looks_ahead=None),
    "flowcut": Setting({"keep": 0.5}, ("seeing",), looks_ahead=None),
    "fastv": Setting({"layer": 1}, ("seeing",), looks_ahead=LAST),
    "flowcut_text": Setting({"layer": 1}, ("seeing",), looks_ahead=LAST),
    "yopo": Setting(
        {"layer": 1, "window": 3, "first": 0},
        ("seeing",),
        looks_ahead="a visual token sees its neighbours on all sides",
        recompiles=1,  # a text of one word beside its image has a graph of its own
        tensors={"yopo/votes/text.model.layers.0.self_attn": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])},
    ),
    "pattention": Setting({"block": 16}, ("parameter_tokens",)),
    "gemfilter": Setting({"keep": 8}, looks_ahead=LAST),
    "lazyllm": Setting({"keep": (0.5,)}, ("prompt", "decoder"), looks_ahead=LAST),
    "spatten": Setting({"keep": 0.3, "dense": 0.0, "first": 0}, ("prompt", "decoder"), looks_ahead=LAST),
    # A sampling run of another batch size is compiled for it.
    "delta_cache": Setting({"start": 0, "interval": 2}, ("denoiser",), recompiles=1),
    "re_ttention": Setting({"start": 0, "interval": 2, "keep": 0.3}, ("denoiser",), recompiles=1),
    # Of as many clusters as blocks of 4 tokens; a batch has centroids of its own.
    "svg2": Setting(
        {"start": 1, "q_clusters": 3, "k_clusters": 4, "top_p": 0.5, "block": 4, "begin": 5, "dense_layers": 0.0},
        ("denoiser", "encoder", "tower"),
        recompiles=1,
    ),
    "tokencache": Setting(_TOKENCACHE, ("denoiser",), tensors={IMPORTANCE: _table()}, recompiles=1),
    "ditfastattn": Setting(
        {"methods": {f"{b}.attn1": "FWAC" for b in _BLOCKS}, "timesteps": TIMES, "window": 3},
        ("denoiser",),
        {"methods": {f"{b}.attn1": "FFFF" for b in _BLOCKS}},
        recompiles=1,
    ),
}


def setting(name: str) -> Setting:
    """Of a registered pass; a third party's has its defaults."""
    return SETTINGS.get(name, Setting(models=("mlp", "prompt", "decoder", "denoiser")))


def names() -> list[str]:
    """Every registered pass."""
    return sorted(registered())
