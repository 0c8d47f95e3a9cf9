"""Every code block of the README and of docs/ is run, or says why not; commands and links in them exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

from accelpass.passes.core.registry import registered
from tests.docs_blocks import KEYS, ROOT, SETUPS, Block, blocks, exists, pages, script

ELSEWHERE = {"README.md": "test_readme", "docs/diffusion.md": "test_readme"}
"""Pages whose Python another test runs, which looks at what is printed."""
ALL = [block for page in pages() for block in blocks(page)]
PYTHON = [p for p in pages() if any(b.language == "python" for b in blocks(p))]
SHELL = [b for b in ALL if b.language in ("", "bash", "sh")]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=named(p)) for p in PYTHON if named(p) not in ELSEWHERE],
)
def test_python_of_a_page_runs(page, tmp_path):
    environment = {**os.environ, "ACCELPASS_DEBUG": ""}
    done = subprocess.run(
        [sys.executable, "-c", script(page)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("block", [b for b in ALL if b.language not in ("", "bash", "sh")], ids=lambda b: b.where)
def test_a_block_is_what_it_says(block: Block):
    match block.language:
        case "python":
            ast.parse(block.code)
        case "toml":
            tomllib.loads(block.code)
        case "json":
            json.loads(block.code)
        case _:
            assert block.language == "text", (
                f"{block.where}: ```{block.language} is checked by no test; use python or text"
            )


@pytest.mark.parametrize("block", [b for b in ALL if b.said], ids=lambda b: b.where)
def test_comments_for_the_tests_are_known(block: Block):
    assert set(block.said) <= set(KEYS), f"{block.where}: known: {', '.join(KEYS)}"
    assert len(block.said.get("not run", "a reason")) > 5, f"{block.where}: why is it not run?"
    assert block.said.get("with", next(iter(SETUPS))) in SETUPS


@pytest.mark.parametrize("block", SHELL, ids=lambda b: b.where)
def test_commands_exist(block: Block):
    """Every line of a block without a language is a command; ours are parsed, with their options and values."""
    if not block.runs:
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if not words:
            continue
        match words:
            case ["accelpass", *rest]:
                check_command(block, rest)
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{block.where}: make {target}"
            case ["python", "-m", module, *_]:
                assert exists(module), f"{block.where}: there is no module {module}"
            case ["python", path, *_] if path.endswith(".py"):
                assert (ROOT / path).exists(), f"{block.where}: there is no {path}"
            case ["pip", "install", *_] | ["cd" | "git" | "twine", *_]:
                pass
            case _:
                pytest.fail(f"{block.where}: {line!r} is no command that is known here; ```text is for what is not run")


def check_command(block: Block, words: list[str]) -> None:
    from accelpass.cli.arguments import passes_from
    from accelpass.cli.main import app
    from accelpass.passes.core.registry import make

    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    name, *rest = words
    assert name in group.commands, f"{block.where}: there is no command accelpass {name}"
    # Options, their values and how many arguments there are; nothing is run.
    context = group.commands[name].make_context(name, list(rest))
    given = context.params.get("passes")
    if given and given not in (["none"], ("none",)):
        for one in passes_from(list(given)) or []:
            make(one)


def test_links_between_pages_exist():
    from docs.site_hooks import OPTIONAL

    made = {page for found in OPTIONAL.values() for page in found}  # some are written by a sweep that runs for hours
    for page in pages():
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            written = target.startswith("passes/") or target.endswith("command-line.md") or Path(target).name in made
            if written or re.match(r"https?:", target):
                continue  # the pages of the passes are written when the site is built, which checks them
            assert (page.parent / target).exists(), f"{named(page)}: {target}"


def test_guides_name_every_pass_that_is_theirs():
    from docs.generate_passes import GUIDES, _source

    for name, cls in registered().items():
        guide = GUIDES.get(Path(_source(cls)).parts[1])
        if guide and cls.__module__.startswith("accelpass."):
            assert f"`{name}`" in (ROOT / "docs" / guide).read_text(), f"docs/{guide} does not name {name}"


@pytest.mark.parametrize("name", sorted(registered()))
def test_the_page_of_a_pass_tells_its_options(name):
    from docs.generate_passes import page
    from docs.pass_savings import Savings

    cls = registered()[name]
    saved = Savings("a model", {}, (("weights", "2 MB", "1 MB"),), (("a.b", "done | so"),), ())
    text = page(cls, saved, (ROOT / "docs" / "benchmarks.md").read_text())
    own = re.findall(r"^\| `(\w+)` \| `.*` \| (.*?) \| (.+) \|$", text, re.M)
    from dataclasses import fields

    assert {n for n, _, _ in own} == {f.name for f in fields(cls)}, (
        "each option has a type, a default and what it means"
    )
    assert all(said.strip() for _, _, said in own), [n for n, _, said in own if not said.strip()]
    assert "| weights | 2 MB | 1 MB |" in text and "done \\| so" in text
    assert ":class:" not in text and "``" not in text.replace("```", "")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_network(tmp_path):
    if shutil.which("mkdocs", path=Path(sys.executable).parent) is None:
        pytest.skip("mkdocs is not installed; pip install 'accelpass[docs]'")
    copy = tmp_path / "repository"
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "site", "*.pyc", "weights")
    )
    measured = copy / "build" / "pass_savings.json"
    measured.parent.mkdir(exist_ok=True)
    saved = {"on": "nothing: this is a test", "options": {}, "rows": [["x", "2 B", "1 B"]], "took": [], "skipped": []}
    measured.write_text(json.dumps(dict.fromkeys(registered(), saved)))
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    for words in (["-m", "docs.generate_passes", "--reuse"], ["-m", "mkdocs", "build", "--strict"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    site = copy / "build" / "site"
    built = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(built) > 30 and (site / "passes" / "h2o" / "index.html").exists()
    asset = re.compile(
        r"<(?:script|img|link|iframe|source)[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)|url\([\"']?((?:https?:)?//[^)]+)"
    )
    for file in built:
        found = [a for pair in asset.findall(file.read_text(errors="replace")) for a in pair if a]
        assert not found, f"{file.relative_to(site)} asks the network for {found[0]}"
