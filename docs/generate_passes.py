"""Writes a page for each registered pass, their index, and the page of the command line. ``make docs`` runs it.

    python -m docs.generate_passes               # measures what each pass saves on a small model: some minutes
    python -m docs.generate_passes --reuse       # takes the figures of the last run

What a page says comes from the pass: its docstring and those of its bases, its fields, its declared order, the classes that
it derives from, what ``accelpass.explain`` says of a run, and the rows of docs/benchmarks.md that name it.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import typer

from accelpass.passes.core.base import PHASES, Calibrated, CalibratedOnLoss, Judged, Pass, SitePatterns
from accelpass.passes.core.registry import registered
from accelpass.passes.feed_forward.duo_llm import DuoLLM
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.pruning.wanda import Wanda
from accelpass.passes.quantization.mixed_precision import MixedPrecision
from accelpass.passes.sparse_attention.span_pass import SpanPass
from accelpass.passes.step_cache.base import Searched, StepPass
from accelpass.passes.structure.shortgpt import ShortGpt
from accelpass.passes.token_pruning.base import TokenPruning
from accelpass.passes.token_pruning.filter import PromptFilter
from accelpass.passes.token_pruning.spatten import SpAtten
from accelpass.passes.visual_tokens.inside import VisualPruning
from accelpass.passes.visual_tokens.one_d_piece import OneDPiece
from accelpass.passes.visual_tokens.tome import ToMe
from accelpass.passes.visual_tokens.visual import VisualFilter
from docs.pass_savings import SETTINGS, Savings, savings

DOCS = Path(__file__).parent
MEASURED = DOCS.parent / "build" / "pass_savings.json"
GUIDES = {
    "kv_cache": "kv-cache.md",
    "sparse_attention": "sparse-attention.md",
    "token_pruning": "token-pruning.md",
    "visual_tokens": "visual-tokens.md",
    "pruning": "structured-pruning.md",
    "experts": "structured-pruning.md",
    "feed_forward": "structured-pruning.md",
    "step_cache": "diffusion.md",
    "quantization": "quantization.md",
}
"""The guide of each family, by the folder that its passes are in."""
NEEDS: tuple[tuple[type, str], ...] = (
    (KVPass, "an `accelpass.KVCache` as `past_key_values`"),
    (SpanPass, "for what it keeps, an `accelpass.KVCache`; prompts need none"),
    (TokenPruning, "a causal decoder; for single tokens an `accelpass.KVCache`"),
    (SpAtten, "a causal decoder, best with an `accelpass.KVCache`, or an encoder"),
    (
        PromptFilter,
        "a causal decoder that returns the last token alone (`logits_to_keep=1`), best with an `accelpass.KVCache`",
    ),
    (StepPass, "a denoising model whose inputs are named as diffusers names them (`hidden_states`, `timestep`)"),
    (Searched, "a plan of `accelpass.search_steps`, which runs the sampler"),
    (DuoLLM, "a plan of `accelpass.calibrate`, except for layers that are skipped"),
    (CalibratedOnLoss, "a plan of `accelpass.calibrate`, or the rule as options"),
    (Judged, "a plan of `accelpass.search_by_score`, or what stays as an option"),
    (Wanda, "a plan of `accelpass.calibrate`"),
    (ShortGpt, "a plan of `accelpass.calibrate`; a decoder"),
    (MixedPrecision, "a plan of `accelpass.calibrate`"),
    (VisualFilter, "a model in whose graph both the tower and the text are (`model(input_ids=..., pixel_values=...)`)"),
    (VisualPruning, "a language model that is given visual tokens"),
    (ToMe, "a vision tower"),
    (OneDPiece, "a tokenizer that reads an image as a sequence of codes, trained to be cut"),
    (Calibrated, "nothing, or for better quality a plan of `accelpass.calibrate`"),
)
"""What a user must bring, by the class that says so."""
_SECTION = re.compile(r"^(Args|Arguments|Attributes|Raises|Returns|Class attributes|Example|Examples):$", re.M)
_ARXIV = re.compile(r"ar[Xx]iv[: ]\s*(\d{4}\.\d{4,5})")


def page(cls: type[Pass], measured: Savings | None, benchmarks: str) -> str:
    """The page of one pass, in Markdown."""
    text, _ = _parted(cls)
    lead, _, rest = text.partition("\n\n")
    parts = [f"# {cls.name}", _plain(lead), *([_plain(rest)] if rest else []), _facts(cls), "## Options", _options(cls)]
    parts += ["## What it saves", _savings(cls, measured)]
    if tables := list(_rows(cls.name, benchmarks)):
        parts += [
            "## Measured",
            "Rows of [all measurements](../benchmarks.md) that name this pass, below the first row.",
            *tables,
        ]
    return "\n\n".join(parts) + "\n"


def index(classes: Sequence[type[Pass]], measured: dict[str, Savings]) -> str:
    """All passes as a table by phase, in the order in which they run."""
    lines = [
        "# All passes",
        f"{len(classes)} passes are registered here. They run in the order of their phases, whatever order they are typed in; "
        "`accelpass passes` lists those of your installation, third parties' among them.",
        "| pass | phase | what it does | source | results | on a small model |",
        "|---|---|---|---|---|---|",
    ]
    table = []
    for cls in sorted(classes, key=lambda c: (PHASES.index(c.phase), c.name)):
        saved = measured.get(cls.name)
        paper = _linked(cls.paper) or "compiler work"
        exact = "exact" if cls.exact else "changed"
        table.append(
            f"| [`{cls.name}`]({cls.name}.md) | {cls.phase} | {_cell(cls.summary)} | {_cell(paper)} | {exact} | {_cell(_best(saved, cls.exact))} |"
        )
    last = (
        "*Exact* results equal the dense model's up to the order of float additions. What stands in the last column is measured "
        "when this page is made, as each pass's page says."
    )
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join([*lines[2:], *table]) + f"\n\n{last}\n"


def _best(saved: Savings | None, exact: bool) -> str:
    """The row in which most is saved."""
    rows = [(what, b, a) for what, b, a in (saved.rows if saved else ()) if b not in ("-", a)]
    found = [(_number(a) / _number(b), what, b, a) for what, b, a in rows if _number(b)]
    if not found or min(found)[0] >= 0.995:
        return "the same arithmetic, in less time" if exact else "not in FLOPs or bytes; see its page"
    _, what, b, a = min(found)
    return f"{what}: {b} to {a}"


def _number(said: str) -> float:
    figure, _, unit = said.partition(" ")
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(unit[:1], 1.0)
    return float(figure) * scale


def _parted(cls: type) -> tuple[str, dict[str, str]]:
    """A class's docstring without its sections, and what its ``Attributes`` say, by field."""
    text = inspect.cleandoc(cls.__doc__ or "")
    heads = [*_SECTION.finditer(text)]
    body = text[: heads[0].start()].strip() if heads else text
    attributes = ""
    for head, following in itertools.zip_longest(heads, heads[1:]):
        if head[1] == "Attributes":
            attributes = textwrap.dedent(text[head.end() : following.start() if following else len(text)].strip("\n"))
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", attributes):
        names, colon, said = entry.partition(":")
        if colon:
            for name in names.split(","):
                found[name.strip()] = " ".join(said.split())
    return body, found


def _facts(cls: type[Pass]) -> str:
    rows = [("type", f"`{_typed(cls)}`"), ("phase", cls.phase)]
    rows.append(("results", "equal the dense model's up to the order of float additions" if cls.exact else "change"))
    if identity := getattr(cls, "identity", None):
        rows.append(("equals the dense model at", ", ".join(f"`{k}={v!r}`" for k, v in identity.items())))
    if cls.paper:
        rows.append(("source", _linked(cls.paper)))
    if needs := [said for base, said in NEEDS if issubclass(cls, base)]:
        rows.append(("needs", "; ".join(needs)))
    for word, names in (("runs after", cls.after), ("runs before", cls.before)):
        if names:
            rows.append((word, ", ".join(_link(n) for n in names)))
    excluded = dict(cls.excludes)
    for other in registered().values():
        if cls.name in other.excludes:
            excluded.setdefault(other.name, other.excludes[cls.name])
    for name, why in excluded.items():
        rows.append((f"not with {_link(name)}", why))
    for word, aspects in (("edits", cls.edits), ("reads what others edit of", cls.reads)):
        if aspects:
            rows.append((word, ", ".join(f"`{a}`" for a in sorted(aspects))))
    for other in registered().values():
        for aspect in sorted(cls.claims.keys() & other.claims.keys()):
            if cls.claims[aspect] != other.claims[aspect]:
                rows.append((f"not with {_link(other.name)}", f"{cls.claims[aspect]}; there, {other.claims[aspect]}"))
    path = _source(cls)
    rows.append(("file", f"`{path}`"))
    guide = GUIDES.get(Path(path).parts[1])
    if guide:
        rows.append(("guide", f"[{guide}](../{guide})"))
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows)])


def _source(cls: type) -> str:
    parts = cls.__module__.split(".")
    return "/".join(parts[1:] if parts[0] == "accelpass" else parts) + ".py"


def _typed(cls: type[Pass]) -> str:
    """How the pass is typed on a command line, with an option that shows its form."""
    given = {k: v for k, v in SETTINGS.get(cls.name, {}).items() if not isinstance(v, list | dict)}
    return f"--passes {cls.name}" + "".join(
        f"{':' if n == 0 else ','}{k}={v}" for n, (k, v) in enumerate(given.items())
    )


def _link(name: str) -> str:
    return f"[`{name}`]({name}.md)" if name in registered() else f"`{name}`"


def _linked(paper: str) -> str:
    return _ARXIV.sub(lambda found: f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})", paper)


def _options(cls: type[Pass]) -> str:
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if isinstance(base, type) and issubclass(base, Pass) and base is not Pass:
            said |= _parted(base)[1]
    shared = {f.name for f in fields(SitePatterns)} if issubclass(cls, SitePatterns) else set()
    own = [f for f in fields(cls) if f.name not in shared]
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for f in [*own, *(f for f in fields(cls) if f.name in shared)]:
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        shown = "required" if default is MISSING else f"`{default!r}`"
        lines.append(f"| `{f.name}` | `{_cell(str(f.type))}` | {shown} | {_cell(_plain(said.get(f.name, '')))} |")
    if len(lines) == 2:
        return "None."
    return "\n".join(lines)


def _savings(cls: type[Pass], measured: Savings | None) -> str:
    if measured is None:
        return "Not measured in this build."
    given = ", ".join(f"`{k}={v}`" for k, v in measured.options.items()) or "its defaults"
    lines = [f"Measured with `accelpass.explain` when this page was made, on {measured.on}; with {given}."]
    table = ["| | without | with |", "|---|---|---|", *(f"| {what} | {b} | {a} |" for what, b, a in measured.rows)]
    lines.append("\n".join(table))
    if issubclass(cls, KVPass):
        lines.append(
            "FLOPs are counted as if a token attended to the whole cache; rows that are evicted or not read save more."
        )
    for title, groups in (("What was done", measured.took), ("What was left alone, and why", measured.skipped)):
        if groups:
            rows = "\n".join(f"| `{_cell(sites)}` | {_cell(why)} |" for sites, why in groups)
            lines.append(f"{title}:\n\n| sites | |\n|---|---|\n{rows}")
    return "\n\n".join(lines)


def _rows(name: str, benchmarks: str) -> Iterator[str]:
    """The tables of the benchmarks cut to their first row and those that name the pass."""
    for section in re.split(r"^## ", benchmarks, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        mine = [line for line in lines[2:] if re.search(rf"\b{re.escape(name)}\b", line)]
        if mine:
            first = [lines[2]] if lines[2] not in mine else []
            on = next((line for line in body.splitlines() if line.startswith("On: ")), "")
            yield f"### {title}\n\n" + "\n".join([*lines[:2], *first, *mine]) + (f"\n\n{on}" if on else "")


def _plain(text: str) -> str:
    """reST of a docstring as Markdown."""
    text = re.sub(r":(?:class|func|data|attr|meth|mod):`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def command_line() -> str:
    """Every command with its arguments and options."""
    from accelpass.cli.main import app

    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    parts = [
        "# The command line",
        "`accelpass COMMAND --help` says the same. Progress goes to stderr; with `--json`, stdout is JSON alone.",
    ]
    for name, command in sorted(group.commands.items()):
        usage = " ".join(_argument(p) for p in command.params if p.param_type_name == "argument")
        parts.append(
            f"## accelpass {name}\n\n{_cell(command.help or '')}\n\n```\naccelpass {name} {usage}".rstrip() + "\n```"
        )
        rows = []
        for p in command.params:
            if getattr(p, "hidden", False) or p.name == "help":
                continue
            names = ", ".join(f"`{o}`" for o in p.opts) if p.param_type_name == "option" else f"`{_argument(p)}`"
            default = (
                ""
                if p.default in (None, (), []) or callable(p.default)
                else f"`{getattr(p.default, 'value', p.default)}`"
            )
            rows.append(f"| {names} | {default} | {_cell(getattr(p, 'help', None) or '')} |")
        if rows:
            parts.append("\n".join(["| | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def main() -> None:
    """Write all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reuse", action="store_true", help="take the figures of the last run, where there are any")
    given = parser.parse_args()
    old = json.loads(MEASURED.read_text()) if given.reuse and MEASURED.exists() else {}
    measured: dict[str, Savings] = {name: _restored(data) for name, data in old.items()}
    for number, name in enumerate(sorted(registered()), 1):
        if name not in measured:
            print(f"{number} of {len(registered())}: {name}", flush=True)
            measured[name] = savings(name)
            MEASURED.parent.mkdir(parents=True, exist_ok=True)
            MEASURED.write_text(json.dumps({n: asdict(s) for n, s in measured.items()}))
    target = DOCS / "passes"
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.md"):
        stale.unlink()
    benchmarks = (DOCS / "benchmarks.md").read_text()
    for name, cls in registered().items():
        (target / f"{name}.md").write_text(page(cls, measured.get(name), benchmarks))
    (DOCS / "reference" / "command-line.md").write_text(command_line())
    # Last, as make goes by it.
    (target / "index.md").write_text(index(list(registered().values()), measured))


def _restored(data: dict[str, Any]) -> Savings:
    pairs = {k: tuple(tuple(row) for row in data[k]) for k in ("rows", "took", "skipped")}
    return Savings(data["on"], data["options"], **pairs)


if __name__ == "__main__":
    main()
