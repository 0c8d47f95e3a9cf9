"""A plan of steps is drawn as PNG, as a page and in a terminal; each shows every layer's action at every step."""

from __future__ import annotations

import io
import itertools
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accelpass.ir.errors import AccelpassError
from accelpass.view.pictures.drawing import MissingExtra
from accelpass.view.pictures.step_picture import draw, figure, page, table, ticks
from accelpass.view.step_plan_view import StepPlanView, labels, lightness, looks

ACTIONS = (
    ("full", "full", "full"),
    ("window", "window+half", "full"),
    ("tokens 50%", "reuse", "reuse"),
    ("tokens 25%", "half", "reuse"),
)
SITES = tuple(f"transformer_blocks.{n}.attn1" for n in range(3))
PLAN = StepPlanView("tiny", SITES, 4, ACTIONS, (1.0, 0.75, 0.3, 0.15), (750.0, 500.0, 250.0, 0.0))


def long_plan(steps: int, layers: int) -> StepPlanView:
    taken = [["full", "reuse", "window"][(step + layer) % 3] for step in range(steps) for layer in range(layers)]
    actions = tuple(tuple(taken[at : at + layers]) for at in range(0, len(taken), layers))
    return StepPlanView("", tuple(map(str, range(layers))), steps, actions, (0.5,) * steps, (1.0,) * steps)


def printed(view: StepPlanView, width: int = 80, colours: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours, color_system="truecolor" if colours else None).print(
        table(view)
    )
    return out.getvalue()


def test_figures_of_a_plan() -> None:
    assert PLAN.share == pytest.approx(0.55)
    assert PLAN.said == "4 steps of 3 layers; 55.0% of the dense FLOPs"
    counts = PLAN.counts()
    assert counts == {
        "full": 4, "window": 1, "half": 1, "tokens 50%": 1, "window+half": 1, "tokens 25%": 1, "reuse": 3
    }  # fmt: skip
    order = list(counts)
    assert (order[0], order[-1]) == ("full", "reuse"), "from light to dark"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0, "actions": (), "flops": (), "timesteps": ()}, "0 steps and 3 layers; there is nothing to show"),
        ({"sites": (), "actions": ((),) * 4}, "4 steps and 0 layers; there is nothing to show"),
        ({"flops": (1.0,)}, "'tiny' has 4 steps and flops of 1"),
        ({"timesteps": (1.0,) * 5}, "4 steps and timesteps of 5"),
        ({"actions": ACTIONS[:3]}, "4 steps and actions of 3"),
        ({"actions": (*ACTIONS[:3], ("full",))}, "step 3 of the plan 'tiny' has 1 actions for 3 layers"),
        ({"actions": (*ACTIONS[:3], ("full", " ", "full"))}, r"step 3 .* says nothing of transformer_blocks\.1\.attn1"),
        ({"flops": (1.0, 1.0, -0.1, 1.0)}, r"step 2 .* takes -0\.1 of the dense step's FLOPs"),
        ({"flops": (float("nan"),) * 4}, "step 0 .* takes nan"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(AccelpassError, match=said):
        replace(PLAN, **change)


def test_cheaper_is_darker_and_no_two_actions_look_alike() -> None:
    every = ["full", "window", "half", "window+half", "reuse", "tokens 75%", "tokens 50%", "tokens 25%", *"abcdef"]
    shown = looks(StepPlanView("", tuple(every), 1, (tuple(every),), (1.0,), (0.0,)))
    assert len({look.colour for look in shown.values()}) == len({look.mark for look in shown.values()}) == len(every)
    light = {action: lightness(look.colour) for action, look in shown.items()}
    assert max(light, key=light.__getitem__) == "full" and min(light, key=light.__getitem__) == "reuse"
    assert light["tokens 75%"] > light["tokens 50%"] > light["tokens 25%"]
    assert light["window+half"] < min(light["window"], light["half"])
    red, green, blue = (int(shown["full"].colour[at : at + 2], 16) for at in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 12, "grey"
    # What methods do most is told apart by lightness alone, a quarter from one to the next.
    often = sorted(light[a] + 0.05 for a in ("full", "window", "half", "window+half", "reuse"))
    assert all(dark * 1.25 < bright for dark, bright in itertools.pairwise(often))
    for action, look in shown.items():
        levels = sorted((light[action] + 0.05, lightness(look.ink) + 0.05))
        assert levels[1] / levels[0] > 3, f"the mark of {action} is read on its colour"


def test_many_actions_have_marks_of_their_own() -> None:
    every = tuple(f"tokens {n}%" for n in range(5, 45))
    marks = [look.mark for look in looks(StepPlanView("", every, 1, (every,), (1.0,), (0.0,))).values()]
    assert len(set(marks)) == len(every) and all(len(mark) == 1 for mark in marks)
    assert looks(PLAN)["tokens 50%"].mark == "5" and looks(PLAN)["window+half"].mark == "W"


def test_labels_leave_out_what_names_have_in_common() -> None:
    assert labels(SITES) == ("transformer_blocks.*.attn1", ["0", "1", "2"])
    assert labels(["b.0.attn", "b.0.ff", "b.1.attn"]) == ("b.*", ["0.attn", "0.ff", "1.attn"])
    assert labels(["a.0", "b"]) == ("", ["a.0", "b"])
    assert labels(["b.0", "b.0.attn"]) == ("b.*", ["0", "0.attn"])
    assert labels(["only.one"]) == ("", ["only.one"])
    assert labels(["same", "same"]) == ("", ["same", "same"])


def test_ticks() -> None:
    assert ticks(4, 18) == [0, 1, 2, 3]
    assert ticks(20, 18) == list(range(0, 20, 2))
    assert ticks(1000, 18) == list(range(0, 1000, 100))


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = draw(PLAN, tmp_path / "p.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width == 1500 and 400 < height < 1500
    grown = draw(long_plan(50, 28), tmp_path / "l.png").read_bytes()
    assert struct.unpack(">II", grown[16:24])[1] > height


def test_what_the_figure_shows() -> None:
    pytest.importorskip("matplotlib")
    shown = figure(PLAN)
    cells, bars = shown.axes
    (image,) = cells.get_images()
    assert image.get_array().shape == (3, 4, 3)
    look = looks(PLAN)
    for step, taken in enumerate(ACTIONS):
        for site, action in enumerate(taken):
            rgb = [round(255 * float(c)) for c in image.get_array()[site, step]]
            assert "#" + "".join(f"{c:02x}" for c in rgb) == look[action].colour, (step, site)
    assert [t.get_text() for t in cells.texts] == [look[a].mark for taken in ACTIONS for a in taken]
    assert [patch.get_height() for patch in bars.patches] == list(PLAN.flops)
    assert [t.get_text() for t in bars.get_xticklabels()] == ["0\n750", "1\n500", "2\n250", "3\n0"]
    assert {t.get_text() for t in bars.texts} == {"dense", "mean\n55.0%"}
    said = {t.get_text() for t in shown.legends[0].get_texts()}
    assert said == {f"{look[a].mark}  {a}: {n / 12:.0%}" for a, n in PLAN.counts().items()}


def test_a_picture_of_one_cell_and_of_more_than_dense(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = StepPlanView("", ("block",), 1, (("full",),), (1.0,), (999.0,))
    assert draw(one, tmp_path / "one.png").stat().st_size > 1000
    more = replace(PLAN, flops=(1.0, 1.5, 1.0, 1.0))
    assert figure(more).axes[1].get_ylim()[1] > 1.5
    tops = [float(y) for y in re.findall(r'<rect class="bar"[^>]* y="([\d.]+)"', page(more))]
    assert tops.index(min(tops)) == 1 and len(tops) == 4


def test_page_has_a_cell_for_each_and_needs_nothing_else(tmp_path: Path) -> None:
    made = draw(PLAN, tmp_path / "p.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<link|<script|<img|src=", made)
    assert made.count('<g class="cell">') == 12 and made.count('<rect class="bar"') == 4
    look = looks(PLAN)
    for step, taken in enumerate(ACTIONS):
        for site, action in zip(SITES, taken, strict=True):
            cell = re.search(
                rf"<title>{re.escape(f'{site}, step {step}: {action}')}</title><rect[^>]* fill=\"(#\w+)\"", made
            )
            assert cell and cell[1] == look[action].colour
    legend = re.search(r'<ul class="legend">(.*?)</ul>', made, re.S)
    assert legend and re.findall(r"</i>([^<]+) <span>(\d+) of 12", legend[1]) == [
        (action, str(count)) for action, count in PLAN.counts().items()
    ]
    assert "tiny: 4 steps of 3 layers; 55.0% of the dense FLOPs" in made
    assert "transformer_blocks.*.attn1" in made


def test_page_escapes_names() -> None:
    made = page(replace(PLAN, title="<b>&", sites=("<i>", "b", "c")))
    assert "<b>&" not in made and "<i>" not in made and "&lt;b&gt;&amp;" in made


def test_terminal_has_a_line_for_each_layer_and_a_mark_for_each_step() -> None:
    lines = printed(PLAN).splitlines()
    assert lines[0] == "tiny: 4 steps of 3 layers; 55.0% of the dense FLOPs"
    rows = [line.split() for line in lines if re.match(r" +\d [·a-zW\d]", line)]
    look = looks(PLAN)
    assert rows == [[str(n), *(look[taken[n]].mark for taken in ACTIONS)] for n in range(3)]
    flops = next(line for line in lines if line.startswith("FLOPs"))
    assert flops.split()[1] == "██▆▆▃▃▂▂"
    for action, count in PLAN.counts().items():
        assert f" {look[action].mark}  {action} ×{count}" in printed(PLAN)


def test_terminal_cells_are_coloured() -> None:
    shown = printed(PLAN, colours=True)
    for action, look in looks(PLAN).items():
        red, green, blue = (int(look.colour[at : at + 2], 16) for at in (1, 3, 5))
        # Its cells and its entry of the legend; cells alike that lie side by side are one stretch of colour or several.
        assert shown.count(f"48;2;{red};{green};{blue}m") >= 2, action


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_long_plan_is_parted_into_bands_that_lose_no_step(width: int) -> None:
    plan = long_plan(100, 2)
    lines = printed(plan, width).splitlines()
    assert all(len(line) <= width for line in lines)
    look = looks(plan)
    for site in range(2):
        bands = [line[6:] for line in lines if re.match(rf" +{site} [·rw]", line)]
        wanted = "".join(look[taken[site]].mark for taken in plan.actions)
        assert "".join(bands).replace(" ", "") == wanted
    assert "full ×67" in "".join(lines) and "reuse ×67" in "".join(lines)


def test_a_picture_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AccelpassError, match=r"\.png or \.html"):
        draw(PLAN, tmp_path / "p.svg")
    with pytest.raises(AccelpassError, match="there is no folder"):
        draw(PLAN, tmp_path / "none" / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'accelpass\[plot\]'"):
        draw(PLAN, tmp_path / "p.png")
    assert draw(PLAN, tmp_path / "p.html").is_file(), "a page is drawn without matplotlib"
