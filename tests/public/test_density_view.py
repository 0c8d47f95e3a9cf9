"""The picture of what heads read: from what a pass says it did, in a terminal and on the page."""

from __future__ import annotations

import io

from rich.console import Console

import accelpass
from accelpass.api.generation import greedy
from accelpass.passes.core.base import Done
from accelpass.view.density_view import Bars, DensityView
from tests.public.conftest import LAYERS, tiny_llama
from tests.public.test_cache_state import IDS


def took(*densities: tuple[float, ...]) -> dict[str, Done]:
    made = {f"layers.{i}.attn": Done("spans", densities=of, tokens=64) for i, of in enumerate(densities)}
    return {"layers.9.attn": Done("nothing to its mask"), **made}


def shown(view: DensityView, width: int = 80, most: int = 12) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(Bars(view, most))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_heads_that_are_alike_are_one_row():
    view = DensityView.of("moa", took((0.5, 0.5, 1.0), (0.25, 0.25, 0.125), (1.0, 1.0)))
    assert view is not None and view.sites == ("layers.0.attn", "layers.1.attn", "layers.2.attn")
    assert view.rows() == [("0..1", (0.5, 0.25, 1.0)), ("2", (1.0, 0.125, None))]
    assert view.mean == (2 * 0.5 + 1 + 2 * 0.25 + 0.125 + 2) / 8
    assert shown(view) == [
        "moa: the last query of 64 tokens reads 58% of the keys, as a mean over heads",
        " 0..1 ▄▂█",
        "    2 █▁",
        " head by layer: layers.*.attn, * from 0 to 2",
    ]


def test_a_narrow_terminal_and_many_heads():
    view = DensityView.of("moa", took(*[tuple((head + layer) / 40 for head in range(20)) for layer in range(9)]))
    assert view is not None
    lines = shown(view, width=12, most=2)
    assert sum("rows of heads more" in " ".join(lines[i : i + 4]) for i in range(len(lines))) >= 2
    assert all(len(line) <= 12 for line in lines)


def test_nothing_to_show():
    assert DensityView.of("h2o", {"layers.0.attn": Done("evicts")}) is None


def test_explain_draws_it(tmp_path):
    model = tiny_llama()
    spans = {"name": "moa", "alpha": 0, "beta": 0.5, "block": 2, "sinks": 2}
    fast = accelpass.compile(model, [spans], lowering="eager")
    greedy(fast, IDS, accelpass.KVCache(model, 24), 3)
    report = accelpass.explain(fast)
    (view,) = report.densities
    # 10 tokens are 5 blocks, of which the last query sees 3 of its span and the first.
    assert (view.name, view.tokens, set(sum(view.densities, ()))) == ("moa", 10, {0.8})
    assert len(view.sites) == LAYERS
    assert "moa: the last query of 10 tokens reads 80% of the keys" in str(report)
    page = report.to_html(tmp_path / "report.html").read_text()
    assert page.count('class="box density"') == LAYERS and "80 % of the keys" in page
    assert report.to_dict()["densities"][0]["tokens"] == 10
