"""The kit's eager cache: an attention that keeps everything is the model itself, whatever caches take turns."""

from __future__ import annotations

import torch

from accelpass.testing import TURNS, EagerAttention, Shape, attended, mixed, probabilities
from accelpass.testing.trial import difference, run


class Everything(EagerAttention):
    def attend(self, layer, q, k, v, scale, mask, index):
        layer["calls"] = layer.get("calls", 0) + 1
        return mixed(probabilities(q, k, scale, mask), v)


class LastAlone(EagerAttention):
    def attend(self, layer, q, k, v, scale, mask, index):
        return v[:, :, -q.shape[2] :].repeat_interleave(q.shape[1] // v.shape[1], 1)


def test_everything_kept_is_the_model():
    model = TURNS.build(0)
    for shape in (Shape(length=9), Shape(batch=2, length=7, every_token=True)):
        want = run(TURNS, model, model, shape)
        assert difference(run(TURNS, attended(model, Everything), model, shape), want) < 1e-5
        assert difference(run(TURNS, attended(model, LastAlone), model, shape), want) > 1e-3
    assert model.config._attn_implementation != "accelpass_eager_cache"


def test_each_cache_has_a_method_of_its_own():
    model, made = TURNS.build(0), list[Everything]()

    def begun() -> Everything:
        made.append(Everything())
        return made[-1]

    called, shape = attended(model, begun), Shape(length=8)
    with torch.no_grad():
        one, two = (TURNS.drive(called, model, shape) for _ in range(2))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
    assert len(made) == 2 and made[0].layers[0]["calls"] == made[1].layers[0]["calls"] == 11
