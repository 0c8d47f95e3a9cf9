"""What each pass saves on a small model: compiled, run, and read off ``accelpass.explain``. For the pages of the passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import accelpass
from accelpass.passes.core.base import Calibrated, CalibratedOnLoss, Pass
from accelpass.passes.core.registry import registered
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.sparse_attention.span_pass import SpanPass
from accelpass.passes.step_cache.base import Searched, StepPass
from accelpass.passes.structure.sdpa_rewrite import SdpaRewrite
from accelpass.view.grouping import alike, collapse
from accelpass.view.report import Report
from accelpass.view.text import flops, size

PROMPT, ANSWER, CAPACITY, STEPS = 512, 2, 640, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "horizontal_fusion": {"copy_weights": True},
    "gemfilter": {"keep": 128},
    "pbs_attn": {"block": 32, "segment": 64, "threshold": 0.9},
    "tidaldecode": {"budget": 64, "first": 1, "reselect": 2},
    "moa": {"alpha": 0, "beta": 0.5, "reserve": 64},
    "sink_window": {"reserve": 64},
    "delta_cache": {"start": 2, "interval": 2},
    "re_ttention": {"start": 2, "interval": 2},
    "ditfastattn": {"threshold": 0.5},
    "tokencache": {"intervals": [2, 2]},
}
"""Options at which a pass does its work on models as small as these; the defaults otherwise."""


@dataclass(frozen=True)
class Savings:
    """What was measured.

    Attributes:
        on: the model and the call, in words; options: what the pass was given.
        rows: (what, without the pass, with it).
        took, skipped: sites that fared alike, and what was done or why not.
    """

    on: str
    options: dict[str, Any]
    rows: tuple[tuple[str, str, str], ...]
    took: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]


def savings(name: str) -> Savings:
    """Run a registered pass alone on the model that it is for."""
    cls = registered()[name]
    options = SETTINGS.get(name, {})
    torch._dynamo.reset()  # graphs of other passes count towards its limit of recompilations
    with mock.patch(
        "accelpass.passes.core.options.DEFAULTS", ()
    ):  # the passes that are on by default would be counted too
        on, report, labels = _denoised(cls, options) if issubclass(cls, StepPass) else _generated(cls, options)
    rows = [("weights read by a call", *map(size, report.weight_bytes))]
    for label, graph in zip(labels, report.graphs, strict=False):
        if graph.flops is not None and not cls.exact:  # an exact pass does the same arithmetic in another form
            rows.append((f"FLOPs of {label}", *map(flops, graph.flops)))
    if report.memory["derived"]:
        rows.append(("packed weights in memory", "-", size(report.memory["derived"])))
    rows += [("key/value cache", size(c.dense_bytes), size(c.bytes)) for c in report.caches if c.dense_bytes]
    done = report.passes[name]
    took = tuple((", ".join(collapse(sites)), what) for what, sites in alike({s: d.what for s, d in done.took.items()}))
    skipped = tuple((", ".join(collapse(sites)), why) for why, sites in alike(done.skipped))
    return Savings(on, options, tuple(rows), took, skipped)


def _generated(cls: type[Pass], options: dict[str, Any]) -> tuple[str, Report, list[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from accelpass.api.generation import new_cache

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=512, max_position_embeddings=1024)
    model = LlamaForCausalLM(config).eval()
    own = (KVPass, SpanPass)
    given: dict[str, Any] = {"passes": [{"name": cls.name, **options}], "lowering": "eager"}
    ids = torch.randint(0, 512, (1, PROMPT + ANSWER))
    if issubclass(cls, Calibrated | CalibratedOnLoss) and not options:
        given["plan"] = accelpass.calibrate(model, [ids[:, :128], ids[:, 128:256]], given.pop("passes"), progress=False)
    fast = torch.compile(model, backend="accelpass", options=given)
    if issubclass(cls, own) or cls.for_prompts:
        cache, kind = accelpass.KVCache(model, CAPACITY), "an `accelpass.KVCache`"
    else:
        cache, kind = new_cache(model, CAPACITY), "a static cache"
    pieces = [ids[:, :PROMPT], *(ids[:, n : n + 1] for n in range(PROMPT, PROMPT + ANSWER))]
    if issubclass(cls, SdpaRewrite):
        pieces = pieces[1:]
    with torch.no_grad():
        for piece in pieces:
            fast(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    on = (
        f"a random Llama of 4 layers, width 128, 4 query and 2 key/value heads, float32; {kind} of {CAPACITY} tokens, a prompt "
        f"of {PROMPT}, then single tokens"
    )
    labels = [f"a prompt of {PROMPT} tokens", "one token"] if len(pieces) > ANSWER else ["one token"]
    return on, accelpass.explain(fast), labels


def _denoised(cls: type[Pass], options: dict[str, Any]) -> tuple[str, Report, list[str]]:
    from accelpass.models_zoo import digits

    with mock.patch.dict(digits.CONFIG, num_layers=4):
        model = digits.transformer(trained=False)
    times = [float(t) for t in torch.linspace(900, 0, STEPS)]

    def sample(one: Any) -> None:
        latents = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
        for time in times:
            given = {"timestep": torch.full((2,), time), "class_labels": torch.tensor([3, 1000])}
            with torch.no_grad():
                latents = latents - 0.1 * one(latents, **given).sample[:, :1]

    passes = [{"name": cls.name, **options}]
    given: dict[str, Any] = {"lowering": "eager"}
    if issubclass(cls, Searched):
        given["plan"] = accelpass.search_steps(model, sample, passes, steps=STEPS, progress=False, options=given)
    else:
        given["passes"] = passes
    fast = torch.compile(model, backend="accelpass", options=given)
    sample(fast)
    on = f"the digits transformer with 4 blocks and random weights, 256 tokens, {STEPS} steps, both guidance halves in one batch"
    return on, accelpass.explain(fast), [f"a step, mean over {STEPS}"]
