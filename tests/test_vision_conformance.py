"""A sample of `python -m tests.vision_conformance`: what is found of how a model sees, and what passes do with it."""

from __future__ import annotations

import pytest

from tests import vision_conformance
from tests.sweep import quick
from tests.vision_models import MODELS


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


@pytest.mark.parametrize("name", quick(list(MODELS), "LLaVA"))
def test_tower_and_places_are_those_of_the_model(name: str) -> None:
    row = vision_conformance.measure(name, passes=())
    assert row["error"] <= vision_conformance.TOLERANCE
    assert vision_conformance.is_right(row) != (name in vision_conformance.EXCEPTIONS), row


@pytest.mark.slow
@pytest.mark.parametrize(("name", "each", "takes"), [("LLaVA", "visionzip", True), ("Gemma 3", "visionzip", False)])
def test_a_pass_takes_a_model_or_says_why_not(name: str, each: str, takes: bool) -> None:
    took, skipped = vision_conformance.tried(name, each)
    assert bool(took) == takes and (took or skipped)


def test_a_tower_that_is_missed_is_seen() -> None:
    row = {"true_blocks": 3, "blocks": [], "true_visual": 4, "visual": [4], "error": 0.0}
    assert not vision_conformance.is_right(row)
    assert vision_conformance.is_right({**row, "blocks": [3]})
    assert not vision_conformance.is_right({**row, "blocks": [3], "visual": [None]})
