"""The committed composition matrix names the passes that there are, and says what is so."""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.composition import PAGE, bench, from_json, in_order, judged, markdown
from tests.pass_settings import names

HELD, PAIRS = from_json(PAGE.with_suffix(".json").read_text())
BY_NAME = {(p.first, p.second): p for p in PAIRS}
PROMPT = ("gemfilter", "lazyllm", "moa", "pbs_attn", "sink_window")
WEIGHTS = ("int8_weights", "int8_dynamic", "int4_weights")
STORES = ("cskv", "h2o", "kv_window", "mikv")
TOGETHER = {
    *((p, w) for p in (*PROMPT, *STORES, "kv_quant", "tidaldecode") for w in WEIGHTS),
    *((s, w) for s in ("delta_cache", "ditfastattn", "tokencache") for w in WEIGHTS),
    *((p, "kv_quant") for p in (*PROMPT, "h2o", "kv_window", "mikv", "tidaldecode")),
    *(("gemfilter", other) for other in (*STORES, "tidaldecode")),
}
"""Pairs that must work on one model, not only be refused."""
SAMPLE = [
    ("h2o", "kv_window"),
    ("tokencache", "ditfastattn"),
    ("keyformer", "kv_quant"),
]
BENCH = bench()


def test_the_page_names_exactly_the_registered_passes():
    assert in_order(names()) == HELD, "passes were added or removed: run make composition"
    assert set(BY_NAME) == set(permutations(HELD, 2)) and len(PAIRS) == len(BY_NAME)
    assert PAGE.read_text() == markdown(PAIRS, HELD), "the page is not that of its data: run make composition"


def test_no_pair_is_wrong_and_order_means_nothing():
    assert not [p for p in PAIRS if p.status == "wrong"]
    assert not [p for p in PAIRS if BY_NAME[p.second, p.first].status != p.status]
    for p in PAIRS:
        assert p.why or p.status in ("right", "apart"), p
        if p.status == "refused":
            assert p.first in p.why and p.second in p.why, p


@pytest.mark.parametrize("pair", sorted(TOGETHER), ids=" + ".join)
def test_these_work_together(pair):
    assert BY_NAME[pair].status == "right", BY_NAME[pair]


@pytest.mark.parametrize("pair", SAMPLE, ids=" + ".join)
def test_a_sample_is_as_the_page_says(pair):
    check(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in permutations(names(), 2) if pair not in SAMPLE], ids=" + ".join)
def test_each_pair_is_as_the_page_says(pair):
    check(pair)


def check(pair: tuple[str, str]) -> None:
    (found,) = judged([pair], BENCH)
    assert (found.status, found.model) == (BY_NAME[pair].status, BY_NAME[pair].model), found
