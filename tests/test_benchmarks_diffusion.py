"""The benchmarks of step caching: what they count is exact, and their rows and tables are those of what was measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accelpass.backends import graphs_of
from accelpass.models_zoo import digits, tiny_diffusers
from accelpass.passes.core.report import GraphReport, StepReport
from benchmarks import diffusion_plots, digits_steps, pixart_steps, run

LETTERS = "FAXCW"
TIMES = [9, 7, 5, 3, 1]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def steps_of(model: torch.nn.Module, call: dict[str, Any], window: int) -> StepReport:
    count = len(model.transformer_blocks)
    methods = {f"transformer_blocks.{i}.attn1": LETTERS for i in range(count)}
    plan = {"name": "ditfastattn", "methods": methods, "timesteps": TIMES, "window": window}
    fast = torch.compile(model, backend="accelpass", options={"passes": [plan], "lowering": "eager"})
    with torch.no_grad():
        halves = call["hidden_states"][:1].repeat(2, 1, 1, 1)
        fast(**{**call, "hidden_states": halves, "timestep": torch.full_like(call["timestep"], TIMES[0])})
    found = graphs_of(model)[-1].report.steps
    assert found is not None
    return found


def test_attention_flops_are_counted_by_step() -> None:
    model, call = tiny_diffusers.build("dit")
    window = 2
    report = steps_of(model.eval(), call, window)
    attention = model.transformer_blocks[0].attn1
    batch = call["hidden_states"].shape[0]
    tokens = (call["hidden_states"].shape[-1] // model.config.patch_size) ** 2
    # Queries with keys, and probabilities with values, in all blocks and heads.
    per_pair = 2 * 2 * attention.inner_dim * len(model.transformer_blocks)
    near = sum(abs(i - j) <= window for i in range(tokens) for j in range(tokens))
    full, band = per_pair * batch * tokens**2, per_pair * batch * near
    assert report.dense_attention == full
    # The first full attention is followed by a window before the next, and so is C: they compute the window too.
    assert report.attention == (full + band, 0, band // 2, full // 2 + band // 2, band)
    assert all(a < f for a, f in zip(report.attention, report.flops, strict=True))
    rest = report.flops[1]
    assert rest == report.dense - full - 8 * batch * tokens * attention.inner_dim**2 * len(model.transformer_blocks)


def test_shares_and_variants() -> None:
    report = GraphReport(1)
    assert digits_steps.shares(None) == digits_steps.shares(report)
    assert digits_steps.shares(report) == {"attention_flops": 1.0, "flops": 1.0, "variants": 1}
    report.steps = StepReport(
        ("a",), (("full",), ("share",), ("share",)), (100, 40, 40), (9, 5, 1), 100, 3, 3, (20, 0, 4), 20, 2
    )
    assert digits_steps.shares(report) == {"attention_flops": 0.4, "flops": 0.6, "variants": 2}


def test_a_ratio_is_that_of_turns() -> None:
    assert digits_steps.ratio([1.0, 30.0, 3.0], [2.0, 60.0, 4.0]) == 0.5


def test_letters_reach_the_published_density() -> None:
    assert pixart_steps.LETTERS.startswith(pixart_steps.CHECKED[:2])
    tokens, caption = 4096, pixart_steps.CAPTION[0]
    reach = tokens // 8
    band = sum(min(tokens, i + reach + 1) - max(0, i - reach) for i in range(tokens)) / tokens**2
    # Full attention computes the window too, for the residual; attention to the caption is never left out.
    share = {"F": 1 + band, "C": (1 + band) / 2, "X": band / 2, "A": 0.0}
    mean = sum(share[letter] for letter in pixart_steps.LETTERS) / len(pixart_steps.LETTERS)
    assert (mean + caption / tokens) / (1 + caption / tokens) <= 0.24


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "flops": 0.5, **more}


def test_rows_of_two_runs_are_merged_in_order() -> None:
    before = [row("inductor"), row("tokencache, all, every 2/2", flops=0.9), row("cache-dit F1B0, 0.2")]
    new = [row("inductor", flops=1.0), row("ditfastattn, threshold 0.1")]
    merged = run._merged(before, new, run.PARTS["digits_steps"].apart)
    assert [r["name"] for r in merged] == [
        "inductor", "ditfastattn, threshold 0.1", "tokencache, all, every 2/2", "cache-dit F1B0, 0.2"
    ]  # fmt: skip
    assert merged[0]["flops"] == 1.0


def test_the_page_has_a_table_for_each_result(tmp_path: Path) -> None:
    digits_result = {
        "device": "here", "rows": [row("inductor")], "steps": 50, "images": 20, "guidance": 2.0, "dense_seconds": 3.25,
        "real_class_accuracy": 0.99, "real_frechet": 1.3,
    }  # fmt: skip
    pixart_result = {
        "device": "here", "rows": [row("step: share")], "layers": 4, "tokens": 4096, "steps": 20, "letters": "FA",
        "variants": 2, "per_variant": 0.25,
    }  # fmt: skip
    (tmp_path / "digits_steps_cpu.json").write_text(json.dumps(digits_result))
    (tmp_path / "pixart_steps_cpu.json").write_text(json.dumps(pixart_result))
    (tmp_path / "smollm2_memory_cpu.json").write_text(json.dumps({"device": "here", "rows": [row("dense")]}))
    page = run._page(tmp_path)
    assert "| inductor | 0.500 |" in page and "| step: share | 0.500 |" in page
    assert page.index("SmolLM2") < page.index("Digits, 50 steps") < page.index("PixArt's shape, 4 of 28 layers")
    assert all(page.count(about) == 1 for about in run.ABOUT.values())


def test_the_timed_transformer_is_what_a_pipeline_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digits.CONFIG, "num_layers", 1)
    real = digits.transformer
    torch.manual_seed(0)
    monkeypatch.setattr(digits, "transformer", lambda: real(trained=False))
    pipe = digits.pipeline()
    expected = digits.sample(pipe, [1], 2, 0)
    other = copy.copy(pipe)
    other.transformer = timed = digits_steps.Timed(pipe.transformer, pipe.transformer)
    assert torch.equal(digits.sample(other, [1], 2, 0), expected)
    assert timed.seconds > 0


def test_a_curve_goes_through_what_no_cheaper_one_beats() -> None:
    points = [(0.5, 3.0), (0.2, 1.0), (0.4, 0.5), (0.9, 2.0)]
    assert diffusion_plots.front(points, rising=True) == [(0.2, 1.0), (0.5, 3.0)]
    assert diffusion_plots.front(points, rising=False) == [(0.2, 1.0), (0.4, 0.5)]


def test_the_picture_has_a_panel_for_each_pair() -> None:
    pytest.importorskip("matplotlib")
    figures = {"class_accuracy": 0.9, "frechet": 2.0, "psnr": 30.0, "attention_flops": 0.3, "time": 0.6}
    rows = [row(name, **figures) for name in ("inductor", "ditfastattn, threshold 0.1", "cache-dit F1B0, 0.2")]
    said = {"rows": rows, "images": 20, "steps": 50, "guidance": 2.0, "device": "here"}
    figure = diffusion_plots.curves(said)
    assert len(figure.axes) == 9
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "dense, Inductor", "DiTFastAttn", "cache-dit (its own process)"
    ]  # fmt: skip
    corners = [ax.get_position() for ax in figure.axes]
    assert min(min(c.x0, c.y0) for c in corners) >= 0 and max(max(c.x1, c.y1) for c in corners) <= 1


@pytest.mark.slow
def test_a_small_run_makes_all_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(digits.CONFIG, "num_layers", 1)
    untrained, compiler = digits.transformer, torch.compile
    torch.manual_seed(0)
    weights = untrained(trained=False).state_dict()

    def same() -> Any:
        model = untrained(trained=False)
        model.load_state_dict(weights)
        return model

    def uncompiled(model: Any, backend: str = "eager", options: dict[str, Any] | None = None) -> Any:
        options = {"lowering": "eager", **(options or {})} if backend == "accelpass" else None
        return compiler(model, backend=backend, options=options)

    def peer(command: list[str], **_: Any) -> None:
        image = torch.zeros(digits.CLASSES, 1, digits.SIZE, digits.SIZE)
        found = {"images": [image], "seconds": [1.0], "reused": 0.25}
        torch.save([{"name": "inductor", **found}, {"name": "cache-dit", **found, "seconds": [0.5]}], command[3])

    monkeypatch.setattr(digits, "transformer", same)
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(digits_steps.subprocess, "run", peer)
    monkeypatch.setattr(digits_steps, "PLANS", tmp_path)
    monkeypatch.setattr(digits_steps, "_weights_digest", lambda: "none")
    sizes = digits_steps.Sizes(steps=4, per_class=1, labels=1, runs=1, batch=1)
    names = ["ditfastattn, threshold 0.4", "tokencache, all, every 2/2"]
    with torch.no_grad():
        made = digits_steps.measure(names, sizes, lambda said: None, "python")
    rows = {r["name"]: r for r in made["rows"]}
    assert list(rows) == ["inductor", *names, "cache-dit"]
    assert len({tuple(r) for r in rows.values()}) == 1, "one table"
    assert rows["inductor"]["psnr"] == 100 and rows["inductor"]["flops"] == rows["inductor"]["time"] == 1
    assert rows["tokencache, all, every 2/2"]["attention_flops"] == 0.5
    assert rows["cache-dit"]["time"] == 0.5 and rows["cache-dit"]["flops"] == 0.75
    assert len(list(tmp_path.glob("*.json"))) == 2
    title = run.PARTS["digits_steps"].title.format(**made)
    assert run._table(title, made["rows"]).count("\n") == 4 + len(rows)
    json.dumps(made)
