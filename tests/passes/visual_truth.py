"""A small LLaVA, and what it answers when the places of some visual tokens are left out of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import accelpass
from tests.passes.vision_truth import compiled
from tests.small_models import relative_error

IMAGE, SIDE, PATCHES, NEW = 9, 4, 16, 4
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 6, "initializer_range": 0.2, "initializer_factor": 3.0,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip


def llava(seed: int = 0, **vision: Any) -> Any:
    """Its tower has a class token and 16 patches; of 4 layers the third gives the features."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION | vision), text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE
    )
    model = LlavaForConditionalGeneration(config).eval()
    for p in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def asked(texts: int = 1, images: int = 1, seed: int = 1, before: int = 3, after: int = 5) -> dict[str, Tensor]:
    """What a processor gives: each text has ``images`` images, each followed by two words."""
    draw = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(16, 128, (texts, n), generator=draw)  # noqa: E731
    parts = [words(before)]
    for _ in range(images):
        parts += [torch.full((texts, PATCHES), IMAGE), words(2)]
    ids = torch.cat([*parts, words(after)], 1)
    pixels = torch.randn(texts * images, 3, 24, 24, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def seen(model: Any, pixels: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each block of the tower: queries, keys, values ``(images, heads, tokens, d)``, and the stream after it."""
    tower = model.model.vision_tower
    streams = tower(pixels, output_hidden_states=True).hidden_states
    made = []
    for before, after, layer in zip(streams, streams[1:], tower.encoder.layers, strict=False):
        x, a = layer.layer_norm1(before), layer.self_attn
        q, k, v = (p(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        made.append((q, k, v, after))
    return made


def class_pays(seen_block: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """What the class token pays each patch in a block that was :func:`seen`, summed over heads: ``(images, patches)``."""
    q, k, _, _ = seen_block
    return (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].sum(1)


@torch.no_grad()
def answer(model: Any, given: dict[str, Tensor], features: Tensor, stays: Tensor) -> Tensor:
    """Tokens that follow one text in which the visual tokens that do not stay are not.

    Args:
        features: of the patches that stay, ``(kept, channels)``, as the language model reads them.
        stays: False for places that are left out, ``(tokens,)``.
    """
    ids = given["input_ids"][:1]
    embeds = model.get_input_embeddings()(ids).clone()
    there = (ids == IMAGE) & stays
    embeds[there] = features
    embeds = embeds[:, stays]
    mask = given["attention_mask"][:1, stays]
    made: Tensor = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    ).logits  # fmt: skip
    return torch.stack(list(made), 1)


@torch.no_grad()
def answered(
    model: Any, given: dict[str, Tensor], *passes: Any, capacity: int = 96, **options: Any
) -> tuple[Tensor, Any]:
    """Logits ``(texts, NEW, words)`` of the compiled model, which takes the most likely word each time; and the model."""
    model(**given, use_cache=False)  # transformers installs hooks at the first call
    fast = compiled(model, list(passes), **options)
    return answered_by(fast, model, given, capacity), fast


@torch.no_grad()
def answered_by(fast: Any, model: Any, given: dict[str, Tensor], capacity: int = 96) -> Tensor:
    """As :func:`answered`, of a model that is compiled."""
    cache = accelpass.KVCache(model, capacity=capacity, batch_size=len(given["input_ids"]))
    made = [fast(**given, past_key_values=cache, logits_to_keep=1).logits]
    mask = given["attention_mask"]
    for _ in range(NEW - 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        word = made[-1][:, -1:].argmax(-1)
        position = mask.sum(1, keepdim=True) - 1
        more = {"attention_mask": mask, "position_ids": position, "logits_to_keep": 1}
        made.append(fast(input_ids=word, past_key_values=cache, **more).logits)
    return torch.cat(made, 1)


def generated(model: Any, given: dict[str, Tensor], *passes: Any, **options: Any) -> tuple[Tensor, Any]:
    """Logits ``(texts, NEW, words)`` of the words that ``generate`` answers with, and the model."""
    torch._dynamo.reset()
    model.compile(backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})
    cache = accelpass.KVCache(model, capacity=96, batch_size=len(given["input_ids"]))
    made = model.generate(
        **given,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(list(made.logits), 1), model


@torch.no_grad()
def embedded(model: Any, given: dict[str, Tensor]) -> Tensor:
    """One text as the language model reads it, ``(1, tokens, channels)``."""
    embeds: Tensor = model.get_input_embeddings()(given["input_ids"]).clone()
    if "pixel_values" in given:
        sizes = {name: given[name] for name in ("image_sizes",) if name in given}
        embeds[given["input_ids"] == IMAGE] = torch.cat(
            list(model.model.get_image_features(given["pixel_values"], **sizes).pooler_output)
        )
    return embeds


@torch.no_grad()
def pruned_answer(model: Any, given: dict[str, Tensor], layer: int, choose: Any, run: Any = None) -> Tensor:
    """What one text is answered with if from ``layer`` on only the chosen tokens of the prompt are read.

    Everything is computed anew for each word, without a cache.

    Args:
        choose: the tokens of the prompt that go on, from queries, keys ``(heads, tokens, d)`` and values of the layer before.
        run: runs a layer in another way than the model: number, module, states, mask, rotary rows, which tokens these are.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    text, x = model.model.language_model, embedded(model, given)
    padding = int((given["attention_mask"][0] == 0).sum())
    prompt, words, chosen = x.shape[1], [], None
    for _ in range(NEW):
        at = torch.arange(x.shape[1])
        position = (at - padding).clamp_min(0)[None]
        states = x
        for number, block in enumerate(text.layers):
            if number == layer:
                at = torch.cat([chosen, torch.arange(prompt, x.shape[1])])
                states, position = states[:, at], position[:, at]
            cos, sin = text.rotary_emb(states, position)
            a = block.self_attn
            mask = (at[:, None] >= at) & ((at >= padding) | (at[:, None] < padding))
            if number == layer - 1 and chosen is None:
                h = block.input_layernorm(states)
                q, k, v = (p(h).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
                q, k = apply_rotary_pos_emb(q, k, cos, sin)
                groups = q.shape[1] // k.shape[1]
                chosen = choose(q[0], k[0].repeat_interleave(groups, 0), v[0].repeat_interleave(groups, 0), mask[-1])
            if run is not None:
                states = run(number, block, states, mask, (cos, sin), at)
            else:
                states = block(
                    states, attention_mask=mask[None, None], position_embeddings=(cos, sin), position_ids=position
                )
        words.append(model.lm_head(text.norm(states[:, -1:])))
        x = torch.cat([x, model.get_input_embeddings()(words[-1].argmax(-1))], 1)
    return torch.cat(words, 1)


def generates_as_pruned(name: str, keep: float, layer: int, texts: int, images: int, choose: Any) -> None:
    """``generate`` with a pass answers each of some padded texts as the model whose later layers read what ``choose`` keeps.

    Args:
        choose: of a text's ids and ``keep``, what :func:`pruned_answer` takes.
    """
    model, question = llava(), asked(texts, images)
    question["input_ids"][0, :2], question["attention_mask"][0, :2] = 0, 0
    got, fast = generated(model, question, {"name": name, "keep": keep, "layer": layer})
    for i in range(texts):
        one = {
            n: t[i * images : (i + 1) * images] if n == "pixel_values" else t[i : i + 1] for n, t in question.items()
        }
        want = pruned_answer(model, one, layer, choose(one["input_ids"][0], keep))
        assert relative_error(got[i], want[0]) < 1e-4
    each = 16 * images
    said = f"{int(each * keep)} of {each} visual tokens go on to {3 - layer} layers"
    assert said in {done.what for done in accelpass.explain(fast).passes[name].took.values()}
