"""Which tokens of a prompt went on: as data, drawn in the report, and over the text."""

from __future__ import annotations

import pytest
import torch

import accelpass
from accelpass import KVCache
from tests.passes.gemfilter_truth import KEEP, LAYER, built, compiled, logits, prompt_of


def test_the_report_draws_what_went_on():
    model, ids = built(), prompt_of(2, 40)
    fast = compiled(model)
    logits(fast, KVCache(model, 64, 2), ids)
    report = accelpass.explain(fast)
    (one,) = report.survivors
    assert one.path == f"model.layers.{LAYER}.self_attn" and len(one.kept) == 2
    assert f"8 of 40 by {one.path}" in str(report) and f"|{one.strip(72)}|" in str(report)
    assert sum(share > 0 for share in one.shares(40)) == KEEP and sum(one.shares(40, 1)) == KEEP
    assert len(one.strip(10)) == 10 and len(one.strip(400)) == 40
    assert report.flops is not None and report.flops[1] < report.flops[0]
    assert report.to_dict()["survivors"][0]["tokens"] == 40
    accelpass.reset(fast)
    assert accelpass.surviving_tokens(fast) == []


def test_the_page_draws_it_too(tmp_path):
    model = built()
    fast = compiled(model)
    logits(fast, KVCache(model, 64), prompt_of(1, 40))
    page = accelpass.explain(fast).to_html(tmp_path / "r.html").read_text()
    assert "Tokens of the last prompt that went on" in page and "8 of 40 tokens kept" in page


def test_over_the_text():
    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    ids = torch.arange(10)[None]
    found = accelpass.SurvivingTokens("x", 10, ((0, 1, 5, 9),))
    assert found.over(Words(), ids) == "w0 w1 ... w5 ... w9"
    assert accelpass.SurvivingTokens("x", 10, ((2, 3),)).over(Words(), ids) == "... w2 w3 ..."
    with pytest.raises(ValueError, match="had 10 tokens"):
        found.over(Words(), ids[:, :9])
