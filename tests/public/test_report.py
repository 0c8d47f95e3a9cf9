"""explain tells what was found, taken and skipped, and says it in text, JSON and HTML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import accelpass
from accelpass.api.lookup import NotCompiled
from accelpass.view.pictures.picture import draw
from tests.public.conftest import LAYERS, Compiled


def test_import_is_light() -> None:
    code = "import accelpass, sys; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_but_the_unfinished_is_there() -> None:
    later = {"load", "save", "reset", "state"}
    assert all(hasattr(accelpass, name) for name in accelpass.__all__ if name not in later)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        accelpass.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"passes": ["int9_weights"]}, "did you mean 'int8_weights'"),
        ({"passes": [{"name": "int4_weights", "group": 32}]}, "did you mean 'group_size'"),
        ({"passes": "int8_weights"}, "it takes a list"),
        ({"lowerin": "eager"}, "did you mean 'lowering'"),
    ],
)
def test_compile_refuses_at_once(options: dict[str, object], said: str) -> None:
    with pytest.raises(accelpass.OptionError, match=said):
        accelpass.compile(torch.nn.Linear(2, 2), **options)  # type: ignore[arg-type]


def test_compile_takes_an_iterator_of_passes() -> None:
    fast = accelpass.compile(torch.nn.Linear(4, 4).eval(), iter(["int8_weights"]), lowering="eager")
    with torch.no_grad():
        fast(torch.ones(1, 4))
    assert accelpass.explain(fast).passes["int8_weights"].took


def test_counts_are_those_of_one_forward(compiled: Compiled) -> None:
    report = compiled.report
    assert len(report.graphs) == 2, "prefill and decode; the second prompt must not compile again"
    per_layer = {"attention": 1, "linear": 7, "norm": 2, "gated_mlp": 1, "kv_cache": 1, "block": 1}
    once = {"linear": 1, "embedding": 1, "norm": 1, "output_head": 1}
    assert report.found == Counter({kind: n * LAYERS for kind, n in per_layer.items()}) + Counter(once)
    weights = sum(p.numel() * 4 for p in compiled.model.parameters())
    assert weights <= report.weight_bytes[0] < weights + 1000, "rope tables, and no cache"
    assert report.weight_bytes[1] < report.weight_bytes[0]
    assert compiled.generated.tokens == compiled.again.tokens


def test_sites_and_reasons(compiled: Compiled) -> None:
    int4 = compiled.report.passes["int4_weights"]
    assert len(int4.took) == LAYERS * 6
    assert int4.took["model.layers.0.self_attn.q_proj"].what == "64x64 int4"
    assert int4.skipped == {
        **{
            f"model.layers.{i}.mlp.down_proj": "96 input channels are not a multiple of group_size=64; "
            "group_size=32 would fit"
            for i in range(LAYERS)
        },
        **dict.fromkeys(
            ("model.embed_tokens", "lm_head"), "lm_head shares this weight and is named in exclude=['lm_head']"
        ),
    }


def test_text_fits_a_terminal(compiled: Compiled) -> None:
    lines = str(compiled.report).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert any(f"model.layers.{{0..{LAYERS - 1}}}.mlp.down_proj ×{LAYERS}" in line for line in lines)
    assert any("group_size=32 would fit" in line for line in lines)


def test_json_has_it_all(compiled: Compiled) -> None:
    data = json.loads(compiled.report.to_json())
    assert data == compiled.report.to_dict()
    assert data["format"] == 1
    assert data["passes"]["int4_weights"]["took"]["model.layers.1.mlp.up_proj"]["bytes_before"] == 96 * 64 * 4


def test_page_needs_nothing_else(compiled: Compiled, tmp_path: Path) -> None:
    page = compiled.report.to_html(tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|\bsrc=|@import|url\(|<link", page)
    assert "group_size=32 would fit" in page
    assert page.count('class="box int4"') == LAYERS * 6
    attention = LAYERS  # grouped query heads
    assert page.count('class="box skipped"') + page.count('class="box kernel"') == LAYERS + 2 + attention
    assert page.count('class="frame"') == LAYERS


def test_page_escapes_what_it_shows(compiled: Compiled, tmp_path: Path) -> None:
    from dataclasses import replace

    page = replace(compiled.report, model="<script>alert(1)</script>").to_html(tmp_path / "r.html").read_text()
    assert "<script>alert" not in page


def test_picture_puts_layers_between_embedding_and_head(compiled: Compiled) -> None:
    picture = draw(compiled.report)
    where = {b.label: b.y for b in picture.boxes if b.label}
    inside = [b.y for b in picture.boxes if not b.label]
    assert where["model.embed_tokens"] < min(inside) < max(inside) < where["lm_head"]
    assert all(b.x >= 0 and b.x + b.width <= picture.width and b.y + b.height <= picture.height for b in picture.boxes)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()


def test_not_called_yet_says_so() -> None:
    with pytest.raises(NotCompiled, match="call it once"):
        accelpass.explain(accelpass.compile(torch.nn.Linear(5, 3), ["int8_weights"], lowering="eager"))


def test_other_backends_and_other_things_are_refused() -> None:
    with pytest.raises(NotCompiled, match=r"by '.*eager.*'; compile it with backend='accelpass'"):
        accelpass.explain(torch.compile(small(), backend="eager"))
    with pytest.raises(NotCompiled, match=r"not the result of torch\.compile"):
        accelpass.explain(small())


def test_other_options_are_another_compilation() -> None:
    model = small()
    exact = accelpass.compile(model, [], lowering="eager")
    packed = accelpass.compile(model, ["int8_weights"], lowering="eager")
    x = torch.ones(2, 8)
    with torch.no_grad():
        exact(x)
        packed(x)
    assert "int8_weights" not in accelpass.explain(exact).passes
    assert len(accelpass.explain(packed).passes["int8_weights"].took) == 2


def test_second_instance_is_found_by_its_shapes() -> None:
    first, second = (accelpass.compile(small(), ["int8_weights"], lowering="eager") for _ in range(2))
    with torch.no_grad():
        first(torch.ones(3, 8))
        second(torch.ones(3, 8))
    report = accelpass.explain(second)
    assert len(report.passes["int8_weights"].took) == 2


def test_function_and_module_compiled_in_place() -> None:
    model = small()

    @torch.compile(backend="accelpass", options={"passes": ["int8_weights"], "lowering": "eager"})
    def run(x: torch.Tensor) -> torch.Tensor:
        return model(x) * 2

    placed = small()
    placed.compile(backend="accelpass", options={"passes": ["int8_weights"], "lowering": "eager"})
    with torch.no_grad():
        run(torch.ones(2, 8))
        placed(torch.ones(2, 8))
    assert accelpass.explain(run).found == accelpass.explain(placed).found == {"linear": 2, "mlp": 1}


def test_pieces_of_a_graph_break_are_added() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    fast = accelpass.compile(Broken().eval(), ["int8_weights"], lowering="eager")
    with torch.no_grad():
        fast(torch.ones(2, 8))
    report = accelpass.explain(fast)
    assert (len(report.graphs), report.found) == (2, {"linear": 2})
    assert set(report.passes["int8_weights"].took) == {"a", "b"}


def test_refresh_sees_a_write_through_data() -> None:
    model = torch.nn.Linear(8, 4).eval()
    fast = accelpass.compile(model, ["int8_weights"], lowering="eager")
    x = torch.randn(2, 8)
    with torch.no_grad():
        fast(x)
        model.weight.data.mul_(-3)
        assert accelpass.refresh(fast) == 2
        torch.testing.assert_close(fast(x), model(x), atol=0.05, rtol=0)


class Odd(torch.nn.Module):
    """An attention whose output product adds a bias, and a router's softmax, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.router = torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(x @ x.transpose(-1, -2), -1)
        return torch.baddbmm(self.bias, probabilities, x) * torch.softmax(self.router(x), -1)


def test_attention_that_is_not_taken_is_listed_with_its_reason(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Odd(), Odd()).eval()
    fast = accelpass.compile(model, [], lowering="eager")
    with torch.no_grad():
        fast(torch.randn(2, 4, 8))
    report = accelpass.explain(fast)
    assert set(report.refused) == {"0", "1"} and set(report.refused.values()) == {"the output product adds a bias"}
    assert "attention" not in report.found and report.to_dict()["refused"] == report.refused
    assert "attention left as the model wrote it  2, which no pass sees" in str(report)
    assert "- {0..1} ×2  the output product adds a bias" in str(report)
    assert "the output product adds a bias" in report.to_html(tmp_path / "report.html").read_text()
