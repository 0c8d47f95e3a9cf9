"""HiRED chooses what its card's oracle chooses, filled up to the budget, and the language model reads that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.passes.visual_tokens.hired import HiRED, shared_out
from tests.passes.vision_truth import compiled
from tests.passes.visual_truth import IMAGE, answer, answered, asked, class_pays, llava, seen
from tests.small_models import relative_error
from tests.sweep import examples, sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def region_ids(side: int, ph: int, pw: int) -> Tensor:
    r = torch.arange(side)
    return ((r * ph // side)[:, None] * pw + (r * pw // side)[None]).flatten()


def hired_mask(
    cls0: Tensor, cls22: Tensor, ph: int, pw: int, rate: float, alpha: float, compat: bool = False
) -> Tensor:
    """The method card's oracle, of one image."""
    p, n = cls0.shape
    m = torch.zeros(p, n, dtype=torch.bool)
    total = int(p * n * rate)
    full = min(int(total * (alpha if p > 1 else 1)), n)
    sub = min(total - full, (p - 1) * n)
    m[0, cls22[0].topk(full).indices] = True
    if p > 1 and sub > 0:
        hot = torch.zeros(n, dtype=torch.bool)
        hot[cls0[0].topk(int(n * (1 - alpha))).indices] = True
        reg = torch.arange(n) // (n // (p - 1)) if compat else region_ids(int(n**0.5), ph, pw)
        cnt = torch.bincount(reg[hot].clamp_max(p - 2), minlength=p - 1).float()
        shares = cnt / cnt.sum().clamp_min(1)
        for s, b in enumerate((shares * sub).int().clamp(max=n).tolist()):
            m[s + 1, cls22[s + 1].topk(b).indices] = True
    return m


@settings(max_examples=examples(40), deadline=None)
@given(
    images=st.integers(1, 3), side=st.integers(2, 5), rows=st.integers(1, 3), columns=st.integers(1, 2),
    keep=st.floats(0.05, 0.95), alpha=st.floats(0, 1), chunks=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_choice_is_the_oracles(images, side, rows, columns, keep, alpha, chunks, seed):
    torch.manual_seed(seed)
    method = HiRED(keep=keep, alpha=alpha, rows=rows, columns=columns, chunks=chunks)
    patches, tiles = side * side, method.tiles
    total = int(tiles * patches * keep)
    if total < 1 or (chunks and patches < tiles - 1):
        return
    early, late = torch.rand(images * tiles, patches), torch.rand(images * tiles, patches)
    region = method.regions(patches, (side, side))
    (at,) = shared_out(tiles, total, alpha, region, early, late)
    assert len(at) == images * total and (at.diff() > 0).all()
    made = torch.zeros(images * tiles * patches, dtype=torch.bool).index_fill(0, at, True).view(images, tiles, patches)
    for i in range(images):
        one = slice(i * tiles, (i + 1) * tiles)
        want = hired_mask(early[one], late[one], rows, columns, keep, alpha, chunks)
        assert not (want & made[i].logical_not()).any()
        filled = late[one][made[i] & want.logical_not()]
        others = late[one][made[i].logical_not()]
        assert filled.numel() == 0 or others.numel() == 0 or filled.min() >= others.max()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "images"), sweep((1, 2, 3), (1, 1, 2)))
def test_the_language_model_goes_on_from_the_patches_that_are_left(rows: int, columns: int, images: int):
    model, question = llava(), asked(images=images)
    options = {"keep": 0.4, "rows": rows, "columns": columns}
    got, fast = answered(model, question, {"name": "hired", **options})
    found = seen(model, question["pixel_values"])
    early, late = class_pays(found[0]), class_pays(found[2])
    method = HiRED(**options)
    (places,) = shared_out(method.tiles, int(method.tiles * 16 * 0.4), 0.5, method.regions(16, (4, 4)), early, late)
    stays = question["input_ids"][0] != IMAGE
    stays[stays.logical_not().nonzero()[places, 0]] = True
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(question["pixel_values"]).pooler_output))[places]
    assert relative_error(got, answer(model, question, features, stays)) < 1e-4
    assert next(iter(accelpass.explain(fast).passes["hired"].took)) == "model.vision_tower.encoder.layers"


@pytest.mark.parametrize(
    ("options", "images", "why"),
    sweep(
        ({"rows": 2, "columns": 2}, 2, "2 tiles are no images of 5"),
        ({"first": 9}, 1, "first=9: model.vision_tower.encoder.layers has 3 blocks"),
        ({"keep": 0.01}, 1, "0 of 16 tokens of an image would be read"),
    ),
)
def test_what_is_not_taken_is_said(options, images, why):
    model, question = llava(), asked(images=images)
    _, fast = answered(model, question, {"name": "hired", **options})
    assert why in accelpass.explain(fast).passes["hired"].skipped["image"]


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"alpha": 1.5}, {"rows": 0}, {"first": -1}])
def test_options(options):
    with pytest.raises(OptionError, match="is not supported; use"):
        HiRED(**options)


@pytest.mark.slow
def test_padding_without_a_cache_is_known_to_leave_the_text_causal():
    model, question = llava(), asked()
    question["input_ids"][0, :2], question["attention_mask"][0, :2] = 0, 0
    want, _ = answered(model, question, {"name": "hired", "keep": 0.5})
    fast = compiled(model, [{"name": "hired", "keep": 0.5}])
    with torch.no_grad():
        got = fast(**question, use_cache=False, logits_to_keep=1).logits
    assert relative_error(got[:, -1], want[:, 0]) < 1e-4
    took = accelpass.explain(fast).passes["hired"].took
    assert took["model.vision_tower.encoder.layers"].what == "8 of 16 visual tokens are read"
