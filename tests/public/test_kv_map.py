"""Snapshots say which tokens a cache keeps, in each form that passes give it, and are drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accelpass
from accelpass.caches.kv_map import FEW_BITS, GONE, KEPT, KVMap, Step, kept, pick_layers, record
from accelpass.ir.core.state import STATE, StateSpec
from accelpass.ir.errors import AccelpassError, CacheError
from accelpass.ir.kv import holdings
from accelpass.view.pictures.drawing import MissingExtra
from accelpass.view.pictures.kv_map_picture import check_target, draw, figure
from tests.public.conftest import LAYERS, tiny_llama

CAPACITY, PROMPT, STEPS = 24, 10, 5
KV_HEADS = 2


def holding(seen: int, **buffers: Tensor) -> Any:
    """A cache whose layers hold these buffers."""
    cache = accelpass.KVCache(tiny_llama(), 6)
    for layer in cache.layers:
        holdings.holding_of(layer.count).tokens = seen
        for name, t in buffers.items():
            spec = StateSpec(f"kv.{name}", tuple(t.shape[1:]), t.dtype, "sequence", batched=True)
            STATE.slot(layer.count, spec).tensor.copy_(t)
    return cache


def test_positions_in_slots_are_kept_and_all_others_gone() -> None:
    cache = holding(5, positions=torch.tensor([[[4, 0, -1], [2, -1, -1]]], dtype=torch.int32))
    assert kept(cache, 0).tolist() == [[KEPT, GONE, GONE, GONE, KEPT], [GONE, GONE, KEPT, GONE, GONE]]


def test_rows_of_few_bits_are_told_apart() -> None:
    retained = torch.tensor([[[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]]], dtype=torch.bool)
    positions = torch.tensor([[[4, 0, -1], [2, -1, -1]]], dtype=torch.int32)
    cache = holding(5, positions=positions, is_retained=retained)
    few = FEW_BITS
    assert kept(cache, 0).tolist() == [[KEPT, few, few, few, KEPT], [few, few, KEPT, few, few]]


def test_a_cache_without_slots_keeps_all_that_it_has_seen() -> None:
    assert kept(holding(4, keys=torch.zeros(1, 2, 6, 8)), 0).tolist() == [[KEPT] * 4] * 2
    assert kept(holding(3, **{"keys.codes": torch.zeros(1, 2, 6, 4, dtype=torch.uint8)}), 1).shape == (2, 3)


def test_rows_in_an_unknown_order_are_refused() -> None:
    with pytest.raises(CacheError, match=r"does not tell whose rows they are"):
        kept(holding(4, keys=torch.zeros(1, 2, 3, 8)), 0)


def test_layers() -> None:
    assert pick_layers(30) == (0, 15, 29)
    assert pick_layers(1) == (0,)
    assert pick_layers(4, [3, 3, 1]) == (3, 1)
    with pytest.raises(CacheError, match="no layer 4: the model has 4"):
        pick_layers(4, [4])


@pytest.fixture(scope="module")
def mikv() -> KVMap:
    model = tiny_llama()
    passes = [{"name": "mikv", "budget": 0.4, "exclude": ["*.1.*"]}]
    fast = accelpass.compile(model, passes, lowering="eager")
    return record(fast, torch.arange(PROMPT)[None], accelpass.KVCache(model, CAPACITY), STEPS)


def test_each_step_is_recorded(mikv: KVMap) -> None:
    assert (mikv.prompt, mikv.layers) == (PROMPT, (0, 1))
    assert [s.seen for s in mikv.steps] == [PROMPT + n for n in range(STEPS)]
    for step in mikv.steps:
        assert step.counts == ((4.0, step.seen - 4.0), (float(step.seen), 0.0)), "4 of 10; and a layer that is dense"
        newest = step.layers[0][:, -2:]
        assert (newest == KEPT).all()
    assert torch.equal(mikv.last[0], mikv.steps[-1].layers[0])
    said = "8 of 24 tokens a head at most, the others in 2 bits; left alone: model.layers.1.self_attn"
    assert mikv.passes == {"mikv": said}
    data = mikv.to_dict()
    assert data["steps"][-1] == {"seen": 14, "kept": [4.0, 14.0], "few_bits": [10.0, 0.0]}
    assert data["bytes"] == mikv.cache.nbytes()


def test_tidaldecode_says_what_cannot_be_shown() -> None:
    model = tiny_llama(1)
    fast = accelpass.compile(model, [{"name": "tidaldecode", "budget": 4, "first": 0, "reselect": 1}], lowering="eager")
    made = record(fast, torch.arange(PROMPT)[None], accelpass.KVCache(model, CAPACITY), 2)
    (note,) = made.notes
    assert "tidaldecode stores every token" in note
    assert all((t == KEPT).all() for t in made.last)


def test_pictures(mikv: KVMap, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = draw(mikv, tmp_path / "m.png", "tiny")
    assert png.read_bytes().startswith(b"\x89PNG")
    page = draw(mikv, tmp_path / "m.html", "tiny").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"https?://|@import|url\(|<link|<script", page)
    assert "tiny: 10 tokens of prompt, 5 generated" in page and "in 2 bits" in page and "is_retained" in page


def test_what_a_picture_says(mikv: KVMap) -> None:
    pytest.importorskip("matplotlib")
    shown = figure(mikv, "tiny")
    assert [ax.get_title(loc="left") for ax in shown.axes] == ["layer 0", "layer 1", "all 2 layers after the last step"]
    assert shown.axes[0].get_title(loc="right") == "at the end a head keeps 4 in full and 10 in few bits, of 14 tokens"
    assert {t.get_text() for t in shown.legends[0].get_texts()} == {
        "in full: 2 of 2 heads", "in full: 1 of 2 heads", "in few bits: all heads", "not there yet"
    }  # fmt: skip
    (image,) = shown.axes[0].get_images()
    assert image.get_array().shape == (STEPS, PROMPT + STEPS - 1, 3)
    assert (image.get_array()[0, PROMPT:] == 1).all(), "white: not there yet"
    one = figure(mikv, head=1)
    assert {t.get_text() for t in one.legends[0].get_texts()} == {"in full", "in few bits", "not there yet"}
    with pytest.raises(AccelpassError, match="no key/value head 2: a layer has 2"):
        draw(mikv, "m.png", head=2)


def test_a_single_step_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = KVMap(holding(4, keys=torch.zeros(1, KV_HEADS, 6, 8)), (0,))
    made.snap()
    assert isinstance(made.steps[0], Step) and len(made.last) == LAYERS
    assert draw(made, tmp_path / "m.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_written_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AccelpassError, match=r"\.png or \.html"):
        check_target(tmp_path / "m.gif")
    with pytest.raises(AccelpassError, match="there is no folder"):
        check_target(tmp_path / "none" / "m.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'accelpass\[plot\]'"):
        check_target(tmp_path / "m.png")
