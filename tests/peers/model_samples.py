"""Generation of transformers' families, and diffusers' transformers, on tiny random models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from accelpass.models_zoo import tiny, tiny_diffusers
from accelpass.models_zoo.tiny_shrink import shrunk
from tests.fuzz.judge import rounded
from tests.peers import denoisers
from tests.peers.case import DEFAULT, ROUNDED, Row, Sample, add, judge

DECODERS = ("llama", "gpt2", "qwen2", "mistral", "gemma2", "phi", "gpt_neox", "opt", "falcon", "bloom")
SEQ2SEQ = ("t5", "bart")
_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 2},
    "assisted": {"do_sample": False},
    "left padding": {"do_sample": False},
}
_NEW = 5


def _model(family: str, seed: int) -> Any:
    if family in SEQ2SEQ:
        import transformers

        config_class, model_class = {
            "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
            "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        }[family]
        torch.manual_seed(seed)
        model: Any = model_class(shrunk(config_class, {})).eval()
    else:
        model = tiny.family(f"causal_lm/{family}").build().model
        if seed:
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.01)
    model.config.get_text_config().use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if family in SEQ2SEQ:
        model.generation_config.decoder_start_token_id = model.generation_config.decoder_start_token_id or 0
    return model


def _answer(model: Any, way: str, vocabulary: int, assistant: Any) -> Any:
    torch.manual_seed(1)
    batch = 1 if way == "assisted" else 2
    ids = torch.randint(16, vocabulary, (batch, 7))
    mask = torch.ones_like(ids)
    if way == "left padding":
        mask[0, :3] = 0
        ids[0, :3] = 0
    more = {"assistant_model": assistant} if way == "assisted" else {}
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_NEW, **_WAYS[way], **more)
    except Exception as error:  # what eager refuses cannot be compared
        return error


def generation_row(family: str, ways: Sequence[str] = tuple(_WAYS)) -> Callable[[Row], None]:
    def body(row: Row) -> None:
        model, assistant = _model(family, 0), _model(family, 1)
        vocabulary = model.config.get_text_config().vocab_size
        for way in ways:
            want = _answer(model, way, vocabulary, assistant)
            if isinstance(want, Exception):
                add(row, way, {})
                continue
            found = {}
            for name, options in (("default", DEFAULT), ("int8_weights", ROUNDED)):
                fast = copy.deepcopy(model)
                got = _answer(_compiled(fast, "accelpass", options), way, vocabulary, assistant)
                right = want if name == "default" else _answer(rounded(fast), way, vocabulary, assistant)
                found[name] = _differs(right, got)
            if any(found.values()):
                plain = _answer(_compiled(copy.deepcopy(model), "aot_eager", None), way, vocabulary, assistant)
                if _differs(want, plain):
                    found = {k: "-" if v else "" for k, v in found.items()}
            add(row, way, found)

    return body


def _compiled(model: nn.Module, backend: str, options: Any) -> nn.Module:
    torch._dynamo.reset()
    model.compile(backend=backend, options=options)
    return model


def _differs(want: Any, got: Any) -> str:
    if isinstance(got, Exception) or isinstance(want, Exception):
        return f"raised {type(got).__name__}: {' '.join(str(got).split())[:200]}"
    return "" if torch.equal(want, got) else f"{want[:, -_NEW:].tolist()} and {got[:, -_NEW:].tolist()}"


def denoiser_row(name: str) -> Callable[[Row], None]:
    def body(row: Row) -> None:
        build = tiny.Family(name, "diffusion").build()
        sample = Sample(name, build.model, (), build.kwargs)
        for dynamic in (False, None):
            add(row, f"dynamic={dynamic}", judge(sample, dynamic))

    return body


def denoiser_class_row(kind: type[nn.Module]) -> Callable[[Row], None]:
    def body(row: Row) -> None:
        try:
            model, given = denoisers.built(kind)
        except Exception as error:  # the report names it
            row["unbuilt"] = " ".join(str(error).split())[:120]
            return
        sample = Sample(kind.__name__, model, (), given)
        for dynamic in (False, None):
            add(row, f"dynamic={dynamic}", judge(sample, dynamic))

    return body


def warm_up() -> None:
    """Import here what every child would."""
    for module in ("transformers.models.llama.modeling_llama", "transformers.generation.candidate_generator"):
        import_module(module)
    import_module("diffusers.models.transformers")


def rows() -> dict[str, Callable[[Row], None]]:
    """What is measured, by key."""
    found = {f"generation/{family}": generation_row(family) for family in (*DECODERS, *SEQ2SEQ)}
    found |= {f"denoiser/{name}": denoiser_row(name) for name in tiny_diffusers.NAMES}
    return found | {f"denoiser/{name}": denoiser_class_row(kind) for name, kind in denoisers.classes().items()}
