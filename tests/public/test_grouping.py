"""Many sites said as few, without saying anything that is not so."""

from __future__ import annotations

import pytest

from accelpass.view.grouping import alike, collapse, expand


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([f"m.layers.{i}.mlp.down" for i in range(30)], ["m.layers.{0..29}.mlp.down"]),
        (["a.0.q", "a.1.q", "a.0.k", "a.1.k"], ["a.{0..1}.{q,k}"]),
        (["a.0.q", "a.2.q", "a.3.q"], ["a.{0,2..3}.q"]),
        (["a.0.e.0.w", "a.0.e.1.w", "a.1.e.0.w", "a.1.e.1.w"], ["a.{0..1}.e.{0..1}.w"]),
        (["a.0.e.0.w", "a.1.e.1.w"], ["a.0.e.0.w", "a.1.e.1.w"]),
        (["a.0.{q,k}", "a.1.{q,k}"], ["a.{0..1}.{q,k}"]),
        (["m.experts[0]", "m.experts[1]"], ["m.experts[{0..1}]"]),
        (["0", "2"], ["{0,2}"]),
        (["conv1d", "lm_head"], ["{conv1d,lm_head}"]),
        (["a.3.q"], ["a.3.q"]),
    ],
)
def test_collapse(paths: list[str], said: list[str]) -> None:
    assert collapse(paths) == said


def test_numbers_become_ranges() -> None:
    groups = alike({"a": "12 rows; a GEMV has one", "b": "the BLAS takes 9 us", "c": "the BLAS takes 10 us"})
    assert groups == [("the BLAS takes 9..10 us", ["b", "c"]), ("12 rows; a GEMV has one", ["a"])]


def test_names_are_not_numbers() -> None:
    assert alike({"a": "8x8 int8", "b": "8x16 int8"}) == [("8x8..16 int8", ["a", "b"])]
    assert len(alike({"a": "8x8 int8", "b": "8x8 int4"})) == 2


@pytest.mark.parametrize(
    ("site", "paths"),
    [("l.0.{q,k}", ["l.0.q", "l.0.k"]), ("lm_head #2", ["lm_head"]), ("{a,b} #3", ["a", "b"]), ("x.y", ["x.y"])],
)
def test_expand(site: str, paths: list[str]) -> None:
    assert expand(site) == paths
