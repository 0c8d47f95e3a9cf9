"""What ``accelpass package`` does: an example call is made, the rest is ``accelpass.package``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accelpass.cli import output
from accelpass.cli.commands.export_command import STEPS, example, first_step, makes_images
from accelpass.cli.options import (
    AskOption,
    Dtype,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    ModelArgument,
    PassesOption,
    PlanOption,
)
from accelpass.cli.terminal import guarded, step

if TYPE_CHECKING:
    from accelpass.backends.package.report import PackageReport

CAPACITY = 2048


@guarded
def package(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file, NAME.pt2.")],
    passes: PassesOption = None,
    cache: Annotated[
        int,
        typer.Option("--cache", min=4, help="Tokens of prompt and answer together that a package has room for."),
    ] = CAPACITY,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts that it takes at once.")] = 1,
    plan: PlanOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps of a schedule: those of the plan, or 50.")
    ] = None,
    ask: AskOption = None,
    guidance: GuidanceOption = 2.0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the compiled graphs with torch.")
    ] = True,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
) -> None:
    """Compile the model with the passes applied into one file, which runs without a compiler.

    Of a language model it is the prompt's graph, that of one token, with room for --cache tokens, and the tokenizer; of any other the model
    itself, for batches and lengths of any size. Of what makes images (digits-dit, a diffusers pipeline's folder or id) it is the
    transformer; --steps, --ask and --guidance say what a run is, as for accelpass sample. In Python: accelpass.open(FILE).
    """
    import torch

    from accelpass.backends.export.capture import bound
    from accelpass.backends.export.files import writable
    from accelpass.backends.package.writing import package as write
    from accelpass.backends.package.writing import wanted
    from accelpass.cli.arguments import passes_from
    from accelpass.cli.loading import makes_text
    from accelpass.models_zoo import resolve

    chosen = wanted(passes_from(passes or []), plan, None, False)
    writable(out, ".pt2")
    with step(f"Loading {model}") as update:
        if ask or makes_images(model):
            loaded, args, kwargs = first_step(model, ask, steps, guidance, dtype.value, update)
            by_step = any(p.by_step for p in chosen.passes)
            count = (steps if steps or plan is not None else STEPS) if by_step else None
            given = bound(loaded, args, kwargs)
            report = write(loaded, given, out, chosen, verify=verify, update=update, steps=count)
        elif makes_text(loaded := (resolved := resolve(model, getattr(torch, dtype.value)))[0]):
            given, _ = example(*resolved, cache)
            room = given.pop("past_key_values").capacity
            given["input_ids"] = given["input_ids"].repeat(batch, 1)
            fast = resolved[1] if hasattr(resolved[1], "backend_tokenizer") else None
            report = write(loaded, given, out, chosen, room, verify=verify, update=update, tokenizer=fast)
        else:
            given, shapes = example(*resolved, None)
            report = write(loaded, given, out, chosen, dynamic_shapes=shapes, verify=verify, update=update)
    shown(model, report, as_json)


def shown(model: str, report: PackageReport, as_json: bool) -> None:
    """Print the report, for people or as JSON."""
    if as_json:
        output.as_json({"model": model, **report.to_dict()})
    else:
        told(report)


def told(report: PackageReport) -> None:
    """Print what was written and what each pass did, as a table."""
    from rich.console import Console
    from rich.text import Text

    from accelpass.view.text import ratio, size

    console = Console(highlight=False)
    output.print_passes(console, {graph: [r for r in records if r.took] for graph, records in report.records.items()})
    console.print(Text(f"{report.path}  {size(report.bytes)}"), soft_wrap=True)
    before, after = report.weights_before, report.weights_after
    console.print(f"weights: {size(before)} -> {size(after)}{ratio(before, after)}")
    if report.difference is not None:
        console.print(f"compiled graphs and torch differ by {report.difference:.1e} of the largest value")
    for note in report.notes:
        console.print(Text(note), soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command."""
    command: Callable[..., None] = package
    app.command("package")(command)
