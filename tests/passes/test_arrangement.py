"""Which patches a visual token is made of is what a projector's gradients say; choices of such tokens are what the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

import accelpass
from accelpass.backends import backend
from accelpass.ir import attention
from accelpass.ir.analyses.structure.vision import Tower, vision
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import inserted
from accelpass.passes.visual_tokens.arrangement import Arrangement, arrangement
from accelpass.passes.visual_tokens.flowcut import FlowCut
from accelpass.passes.visual_tokens.hired import HiRED, shared_out
from accelpass.passes.visual_tokens.visionzip import VisionZip, zipped
from accelpass.passes.visual_tokens.visual import Left, VisualFilter, patch_stream
from tests import vision_models
from tests.passes.visual_truth import IMAGE, class_pays, seen
from tests.small_models import relative_error


@pytest.fixture(autouse=True)
def _counts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def with_padding(built: vision_models.Seen) -> vision_models.Seen:
    """LLaVA-NeXT's tiles of an image that is half as high as they are: the text has no places for what was filled up."""
    given = dict(built.given)
    given["image_sizes"] = torch.tensor([[12, 48]])
    pixels, sizes = given["pixel_values"], given["image_sizes"]
    with torch.no_grad():
        count = sum(map(len, built.model.model.get_image_features(pixels, image_sizes=sizes).pooler_output))
    ids = given["input_ids"]
    places = ids == IMAGE
    keep = ~(places & (places.cumsum(1) > count))
    given |= {name: given[name][keep][None] for name in ("input_ids", "attention_mask")}
    return vision_models.Seen(built.model, given, built.blocks, count)


def arranged(built: vision_models.Seen) -> Arrangement:
    found: list[Arrangement] = []

    def keep(gm: Any, inputs: Any) -> Any:
        program = from_dynamo(gm, inputs)
        attention.insert(program)
        (entry,) = program.analysis(vision).entries
        assert entry.tower is not None
        found.append(arrangement(program, entry, *patch_stream(entry.tower, entry)))
        return backend(gm, inputs, options={"lowering": "eager", "passes": []})

    torch._dynamo.reset()
    accelpass.one_graph(built.model)
    with torch.no_grad():
        torch.compile(built.model, backend=keep, dynamic=False)(**built.given)
    return found[0]


def patches_by_gradient(built: vision_models.Seen, projector: str) -> list[set[int]]:
    """Of each visual token, the patches that its gradient reaches, among those that the projector reads."""
    held: list[Tensor] = []

    def leaf(module: Any, args: Any) -> Any:
        held.append(args[0].detach().requires_grad_())
        return (held[-1], *args[1:])

    hook = built.model.model.get_submodule(projector).register_forward_pre_hook(leaf)
    names = ("image_sizes", "pixel_attention_mask")
    more = {name: built.given[name] for name in names if name in built.given}
    features = built.model.model.get_image_features(built.given["pixel_values"], **more).pooler_output
    hook.remove()
    rows = torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, -2)
    found = []
    for row in rows:
        (gradient,) = torch.autograd.grad(row.sum(), held[-1], retain_graph=True, allow_unused=True)
        reached = torch.zeros(1) if gradient is None else gradient.abs().sum(-1).flatten()
        found.append(set(reached.nonzero().flatten().tolist()))
    return found


@pytest.mark.parametrize(
    ("name", "projector", "pads"),
    [("SmolVLM", "connector", False), ("LLaVA-NeXT", "multi_modal_projector", True)],
)
def test_a_visual_token_is_made_of_the_patches_that_its_gradient_reaches(name: str, projector: str, pads: bool):
    built = vision_models.build(name)
    built = with_padding(built) if pads else built
    want = patches_by_gradient(built, projector)
    got = arranged(built)
    units, patches = len(got.members), 16
    said = [
        set() if unit < 0 else {unit // units * patches + patch for patch in got.members[unit % units].tolist()}
        for unit in got.places
    ]
    assert said == want
    assert bool(got.present.all()) != pads and (-1 in got.places) == pads and not got.is_plain


@torch.no_grad()
def logits(built: vision_models.Seen, features: Tensor, stays: Tensor) -> Tensor:
    """Of the last token, where the places of visual tokens that do not stay are left out of the text."""
    ids = built.given["input_ids"]
    embeds = built.model.get_input_embeddings()(ids).clone()
    embeds[(ids == IMAGE) & stays] = features
    told = {name: t[:, stays] for name, t in built.given.items() if name in ("attention_mask", "token_type_ids")}
    made: Tensor = built.model(inputs_embeds=embeds[:, stays], **told, use_cache=False).logits[:, -1:]
    return made


def compiled_logits(built: vision_models.Seen, made: dict[str, Any]) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    accelpass.one_graph(built.model)
    fast = torch.compile(
        built.model, backend="accelpass", options={"lowering": "eager", "passes": [made]}, dynamic=False
    )
    with torch.no_grad():
        got = fast(**built.given).logits
    return got, next(iter(accelpass.explain(fast).passes[made["name"]].took.values())).what


@pytest.mark.slow
def test_visionzip_merges_tokens_that_are_made_of_several_patches():
    built = vision_models.build("SmolVLM")
    given, keep, units = built.given, 0.75, arranged(built)
    built = vision_models.build("SmolVLM")
    held: dict[str, Tensor] = {}
    last = built.model.model.vision_model.encoder.layers[-1].self_attn
    hooks = [
        getattr(last, f"{n}_proj").register_forward_hook(lambda m, a, out, n=n: held.__setitem__(n, out)) for n in "qk"
    ]
    with torch.no_grad():
        features = torch.cat(list(built.model.model.get_image_features(given["pixel_values"]).pooler_output))
    for hook in hooks:
        hook.remove()
    q, k = (held[n].unflatten(-1, (last.num_heads, -1)).transpose(1, 2) for n in "qk")
    paid = (q @ k.mT * last.scale).softmax(-1).sum((1, 2))
    of = units.members
    tokens = features.view(2, len(of), -1)
    stream, places = zipped(0, *VisionZip(keep=keep).counts(len(of)), tokens, k[:, :, of].mean(3), paid[:, of].sum(-1))
    stays = given["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[places, 0]] = True
    want = logits(built, stream.flatten(0, 1), stays)
    got, said = compiled_logits(built, {"name": "visionzip", "keep": keep})
    assert said == "6 of 8 visual tokens are read"
    assert relative_error(got, want) < 1e-4


@torch.no_grad()
def flown(model: Any, pixels: Tensor, members: Tensor, counts: dict[int, int]) -> tuple[Tensor, Tensor]:
    """FlowCut's loop over SmolVLM's tower, patches of one visual token together: the tower's output with zeros where patches have left,
    and the visual tokens that are left, ``(images, kept)``."""
    inner = model.model
    tower = inner.vision_model
    mask = torch.ones(len(pixels), *(side // tower.patch_size for side in pixels.shape[-2:]), dtype=torch.bool)
    x = tower.embeddings(pixel_values=pixels, patch_attention_mask=mask)
    unit = torch.empty(x.shape[1], dtype=torch.long)
    unit[members] = torch.arange(len(members)).unsqueeze(-1)
    ids, cum = torch.arange(x.shape[1]).expand(len(x), -1), None
    for number, layer in enumerate(tower.encoder.layers):
        h, a = layer.layer_norm1(x), layer.self_attn
        q, k, v = (p(h).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        paid = ((q.mean(2, True) @ k.mT) * a.scale).softmax(-1)[:, :, 0].mean(1)
        score = paid * v.mean(1).abs().sum(-1)
        cum = score if cum is None else 0.5 * cum + 0.5 * score
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        if number in counts:
            kept = []
            for of, some in zip(unit[ids], cum, strict=True):
                sums = torch.full((len(members),), -torch.inf)
                for each in of.unique():
                    sums[each] = some[of == each].sum()
                best = sums.topk(counts[number]).indices
                kept.append(torch.isin(of, best).nonzero()[:, 0])
            rows = torch.stack(kept)
            cum, ids = cum.gather(1, rows), ids.gather(1, rows)
            x = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    whole = torch.zeros(len(x), len(unit), x.shape[-1])
    whole.scatter_(1, ids.unsqueeze(-1).expand_as(x), tower.post_layernorm(x))
    return whole, torch.stack([of.unique() for of in unit[ids]])


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [0.5, None])
def test_flowcut_keeps_the_patches_of_a_visual_token_together(entropy: float | None):
    built = vision_models.build("SmolVLM")
    units, keep = arranged(built), 0.5
    built = vision_models.build("SmolVLM")
    layers = len(built.model.model.vision_model.encoder.layers)
    method = FlowCut(keep=keep, entropy=entropy)
    count = len(units.members)
    assert layers == 3  # the one choice there is takes what must be left, whatever the entropy
    counts = method.schedule(count, [0.0 if entropy is None else entropy] * layers)
    pixels = built.given["pixel_values"].flatten(0, 1)
    whole, kept = flown(built.model, pixels, units.members, counts)
    with torch.no_grad():
        features = built.model.model.connector(whole)
    assert features.shape[:2] == (len(pixels), count)
    places = (kept + torch.arange(len(kept)).unsqueeze(-1) * count).flatten()
    stays = built.given["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[:, 0][[units.places.index(p) for p in places.tolist()]]] = True
    order = [p for p in units.places if p in set(places.tolist())]
    want = logits(built, features.flatten(0, 1)[order], stays)
    got, said = compiled_logits(built, {"name": "flowcut", "keep": keep, "entropy": entropy})
    assert said == f"{len(places)} of {len(units.places)} visual tokens are read"
    assert relative_error(got, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_hired_leaves_new_lines_where_they_are(keep: float):
    built = with_padding(vision_models.build("LLaVA-NeXT"))
    pixels, sizes = built.given["pixel_values"], built.given["image_sizes"]
    found = seen(built.model, pixels.flatten(0, 1))
    early, late = class_pays(found[0]), class_pays(found[1])
    with torch.no_grad():
        features = torch.cat(list(built.model.model.get_image_features(pixels, image_sizes=sizes).pooler_output))
    units = arranged(built)
    built = with_padding(vision_models.build("LLaVA-NeXT"))
    options = {"keep": keep, "rows": 1, "columns": len(early) - 1}
    method = HiRED(**options)
    assert method.tiles == len(early)
    of, there = units.members, units.present
    early, late = (scores[:, of].sum(-1).masked_fill(~there, -1.0) for scores in (early, late))
    regions = method.regions(16, (4, 4))
    total = int(method.tiles * len(of) * keep)
    (chosen,) = shared_out(method.tiles, total, 0.5, tuple(regions[i] for i in of[:, 0].tolist()), early, late, there)
    assert bool(there.flatten()[chosen].all()) and len(chosen) == total
    kept = torch.tensor([unit < 0 or unit in chosen.tolist() for unit in units.places])
    stays = built.given["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[:, 0]] = kept
    want = logits(built, features[kept], stays)
    got, said = compiled_logits(built, {"name": "hired", **options})
    assert said == f"{int(kept.sum())} of {len(kept)} visual tokens are read"
    assert relative_error(got, want) < 1e-4


@pytest.mark.slow
def test_hired_leaves_class_tokens_that_the_text_has_places_for():
    built = vision_models.build("Video-LLaVA")
    pixels, inner = built.given["pixel_values_videos"], built.model.model
    found = seen(SimpleNamespace(model=SimpleNamespace(vision_tower=inner.video_tower)), pixels.flatten(0, 1))
    early, late = class_pays(found[0]), class_pays(found[1])
    with torch.no_grad():
        features = inner.get_video_features(pixels).pooler_output.flatten(0, -2)
    (chosen,) = shared_out(1, 6, 0.5, (0,) * 16, early, late)
    kept = torch.zeros(4, 17, dtype=torch.bool)
    kept[:, 0] = True
    kept[:, 1:] = torch.zeros(64, dtype=torch.bool).index_fill(0, chosen, True).view(4, 16)
    stays = built.given["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[:, 0]] = kept.flatten()
    want = logits(built, features[kept.flatten()], stays)
    got, said = compiled_logits(built, {"name": "hired", "keep": 0.4})
    assert said == "28 of 68 visual tokens are read"
    assert relative_error(got, want) < 1e-4


@dataclass(frozen=True)
class Fixed(VisualFilter):
    """Reads these of the patches."""

    places: tuple[int, ...] = (0, 3, 4, 5, 9, 15)
    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "reads these of the patches"

    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        run = lambda x: [torch.tensor(self.places, device=x.device)]  # noqa: E731
        return Left(inserted(program, before, run, tower.end)[0])


def test_a_prefix_that_sees_all_of_itself_closes_up():
    """PaliGemma's prompt is no causal one; with a cache it is told all the same what the language model's attentions are."""
    built = vision_models.build("PaliGemma")
    with torch.no_grad():
        features = built.model.model.get_image_features(built.given["pixel_values"]).pooler_output.flatten(0, 1)
    stays = built.given["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[list(Fixed().places), 0]] = True
    want = logits(built, features[list(Fixed().places)], stays)
    torch._dynamo.reset()
    built = vision_models.build("PaliGemma")
    accelpass.one_graph(built.model)
    fast = torch.compile(
        built.model, backend="accelpass", options={"lowering": "eager", "passes": [Fixed()]}, dynamic=False
    )
    cache = accelpass.KVCache(built.model, 64)
    with torch.no_grad():
        got = fast(**built.given | {"use_cache": True, "past_key_values": cache}).logits
    assert "6 of 16" in next(iter(accelpass.explain(fast).passes["fixed"].took.values())).what
    assert relative_error(got, want) < 1e-4
