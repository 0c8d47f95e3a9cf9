"""The small models that the kit runs passes on, and how each is called by its user."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.models_zoo import small

Drive = Callable[[Any, nn.Module, "Shape"], Iterator[Tensor]]
"""Calls the first argument, the compiled model or whatever stands for it, as the second is called."""


@dataclass(frozen=True)
class Shape:
    """One run.

    Attributes:
        length: tokens of the prompt; a denoiser has latents of one size and ignores it.
        seed: of the inputs; the weights have another.
        changed_from: from this token on the inputs are others than those of ``seed``; None for none.
        every_token: a decoder returns the logits of all tokens, not of the last alone as ``generate`` asks for.
    """

    batch: int = 1
    length: int = 24
    seed: int = 1
    changed_from: int | None = None
    every_token: bool = False

    def ids(self, words: int, extra: int = 0) -> Tensor:
        """Tokens ``(batch, length + extra)``."""
        size = (self.batch, self.length + extra)
        made = torch.randint(0, words, size, generator=torch.Generator().manual_seed(self.seed))
        if self.changed_from is not None:
            other = torch.randint(1, words, size, generator=torch.Generator().manual_seed(self.seed + 1))
            made[:, self.changed_from :] = (made + other)[:, self.changed_from :] % words
        return made


@dataclass(frozen=True)
class Subject:
    """A model that passes are tried on.

    Attributes:
        build: the model in eval mode, from a seed for its weights.
        drive: one run of it; yields a tensor for each call, ``(batch, tokens, ...)`` of a causal model.
        causal: no token sees a later one.
        delimited: each run begins anew by itself (a new cache, a new sampling run), so nothing may stay from the last.
        export: arguments for ``torch.export``; None if one call of the model shows nothing.
        shapes: of runs that one compiled model is used for, one after the other.
        needs: packages.
    """

    name: str
    build: Callable[[int], nn.Module]
    drive: Drive
    causal: bool = False
    delimited: bool = False
    export: Callable[[Shape], tuple[tuple[Any, ...], Mapping[str, Any]]] | None = None
    shapes: tuple[Shape, ...] = (Shape(length=24), Shape(length=20), Shape(length=17))
    needs: tuple[str, ...] = ()
    about: str = field(default="", compare=False)

    @property
    def missing(self) -> str | None:
        """What to install first, or None."""
        absent = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"needs {', '.join(absent)}; type: pip install {' '.join(absent)}" if absent else None


def _mlp(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    yield fast(shape.ids(128))


def _prompt(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    keep = {} if shape.every_token else {"logits_to_keep": 1}
    yield fast(input_ids=shape.ids(small.VOCABULARY), use_cache=False, **keep).logits


STEPS = 2
"""Single tokens after the prompt."""


def _decoder(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    from accelpass.caches.kv_cache import KVCache

    cache = KVCache(model, capacity=64, batch_size=shape.batch)
    ids, keep = shape.ids(small.VOCABULARY, STEPS), {} if shape.every_token else {"logits_to_keep": 1}
    yield fast(input_ids=ids[:, : shape.length], past_key_values=cache, **keep).logits
    for at in range(shape.length, shape.length + STEPS):
        yield fast(input_ids=ids[:, at : at + 1], past_key_values=cache, **keep).logits


def _attention_experts(seed: int) -> nn.Module:
    from accelpass.api.growing.upcycling import upcycle

    return upcycle([small.decoder(seed), small.decoder(seed + 1)], attention="shared_kv", top_k=2).model


def _encoder(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    yield fast(input_ids=shape.ids(small.VOCABULARY)).last_hidden_state


def _pixels(shape: Shape) -> Tensor:
    return torch.randn((shape.batch, 3, 24, 24), generator=torch.Generator().manual_seed(shape.seed))


def _tower(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    yield fast(pixel_values=_pixels(shape)).logits


def _tokenizer(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    yield fast(_pixels(shape))


def _seeing(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    from accelpass.caches.kv_cache import KVCache

    cache = KVCache(model, capacity=64, batch_size=shape.batch)
    ids, keep = _words_and_image(shape), {} if shape.every_token else {"logits_to_keep": 1}
    prompt = {"input_ids": ids[:, : shape.length], "pixel_values": _pixels(shape)}
    yield fast(**prompt, past_key_values=cache, **keep).logits
    for at in range(shape.length, shape.length + STEPS):
        yield fast(input_ids=ids[:, at : at + 1], past_key_values=cache, **keep).logits


def _words_and_image(shape: Shape) -> Tensor:
    ids = shape.ids(small.VOCABULARY, STEPS)
    ids = ids.masked_fill(ids == small.IMAGE, small.IMAGE + 1)
    ids[:, 1:17] = small.IMAGE
    return ids


TIMES = (9.0, 7.0, 5.0, 3.0)
"""Timesteps of the denoiser's run."""


def _denoiser(fast: Any, model: nn.Module, shape: Shape) -> Iterator[Tensor]:
    """Guidance as one batch of two halves; each output moves the latents."""
    one = torch.randn((shape.batch, 4, 8, 8), generator=torch.Generator().manual_seed(shape.seed))
    latents, labels = torch.cat([one, one]), torch.arange(2 * shape.batch) % 10
    for time in TIMES:
        given = {"hidden_states": latents, "timestep": torch.full((2 * shape.batch,), time), "class_labels": labels}
        made = fast(**given, return_dict=False)[0]
        yield made
        cond, uncond = made[:, :4].chunk(2)
        moved = latents[: shape.batch] - 0.3 * (2 * cond - uncond)
        latents = torch.cat([moved, moved])


_BATCHES = (Shape(batch=1), Shape(batch=2), Shape(batch=3))

SUBJECTS: dict[str, Subject] = {
    s.name: s
    for s in (
        Subject(
            "mlp",
            small.tiny_lm,
            _mlp,
            causal=True,
            export=lambda shape: ((shape.ids(128),), {}),
            about="an embedding tied to the output head around two gated MLPs; no attention",
        ),
        Subject(
            "lexicon",
            small.lexicon,
            _mlp,
            export=lambda shape: ((shape.ids(128),), {}),
            about="the same with a head whose scores are reduced to the largest of each word",
        ),
        Subject(
            "pooled",
            small.pooled,
            _mlp,
            causal=True,
            export=lambda shape: ((shape.ids(128),), {}),
            about="two layers that choose among each other's experts; no attention",
        ),
        Subject(
            "parameter_tokens",
            small.parameter_tokens,
            _mlp,
            causal=True,
            export=lambda shape: ((shape.ids(128),), {}),
            about="projections that are attention over learnt keys and values",
        ),
        Subject(
            "recurrent",
            small.recurrent,
            _mlp,
            causal=True,
            export=lambda shape: ((shape.ids(128),), {}),
            about="one body of six trips that reads the embedding anew in each; no attention",
        ),
        Subject(
            "prompt",
            small.decoder,
            _prompt,
            causal=True,
            export=lambda shape: ((), {"input_ids": shape.ids(small.VOCABULARY), "use_cache": False}),
            needs=("transformers",),
            about="a Llama that reads a prompt, without a cache",
        ),
        Subject(
            "decoder",
            small.decoder,
            _decoder,
            causal=True,
            delimited=True,
            needs=("transformers",),
            about=f"the same with an accelpass.KVCache: a prompt, then {STEPS} single tokens",
        ),
        Subject(
            "experts",
            small.experts,
            _prompt,
            causal=True,
            export=lambda shape: ((), {"input_ids": shape.ids(small.VOCABULARY), "use_cache": False}),
            needs=("transformers",),
            about="a Mixtral that reads a prompt, without a cache, its experts in batched products",
        ),
        Subject(
            "attention_experts",
            _attention_experts,
            _decoder,
            causal=True,
            delimited=True,
            export=lambda shape: ((), {"input_ids": shape.ids(small.VOCABULARY), "use_cache": False}),
            needs=("transformers",),
            about="two Llamas in one, whose attentions are experts that share keys and values, with an accelpass.KVCache",
        ),
        Subject(
            "encoder",
            small.encoder,
            _encoder,
            export=lambda shape: ((), {"input_ids": shape.ids(small.VOCABULARY)}),
            needs=("transformers",),
            about="a BERT",
        ),
        Subject(
            "tower",
            small.tower,
            _tower,
            export=lambda shape: ((), {"pixel_values": _pixels(shape)}),
            shapes=_BATCHES,
            needs=("transformers",),
            about="a ViT that classifies images of 16 patches",
        ),
        Subject(
            "tokenizer",
            small.piece_tokenizer,
            _tokenizer,
            export=lambda shape: ((_pixels(shape),), {}),
            shapes=_BATCHES,
            about="an image as a sequence of 12 codes and back",
        ),
        Subject(
            "seeing",
            small.seeing,
            _seeing,
            causal=True,
            delimited=True,
            needs=("transformers",),
            about="a Llama that reads an image among its words, with an accelpass.KVCache",
        ),
        Subject(
            "denoiser",
            small.denoiser,
            _denoiser,
            delimited=True,
            shapes=_BATCHES,
            needs=("diffusers",),
            about=f"a DiT with guidance, in a sampling run of {len(TIMES)} steps",
        ),
    )
}
"""The models by name. Those of a domain that they do not cover are given to the kit as :class:`Subject`."""


def subject(given: str | Subject) -> Subject:
    """A subject by name.

    Raises:
        OptionError: there is none; names the nearest.
    """
    from accelpass.ir.errors import OptionError
    from accelpass.passes.core.fields import nearest

    if isinstance(given, Subject):
        return given
    if given not in SUBJECTS:
        raise OptionError(f"no model {given!r}{nearest(given, SUBJECTS)}; known: {', '.join(SUBJECTS)}, or a Subject")
    return SUBJECTS[given]
