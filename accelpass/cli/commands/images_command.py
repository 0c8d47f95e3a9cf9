"""``accelpass search-steps`` and ``accelpass sample``: their options, and what is printed; the work is in ``sampling_command.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from accelpass.cli import output
from accelpass.cli.loading import options_of
from accelpass.cli.options import (
    AskOption,
    DeviceOption,
    GuidanceOption,
    HtmlOption,
    JsonOption,
    Lowering,
    LoweringOption,
    PassesOption,
    PlanOption,
    SeedOption,
    StepsOption,
)
from accelpass.cli.terminal import UsageMistake, guarded, step


@guarded
def search_steps(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="digits-dit, or a diffusers pipeline's folder or id.")],
    passes: PassesOption = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes.")] = Path("steps.json"),
    steps: StepsOption = 50,
    ask: AskOption = None,
    guidance: GuidanceOption = 2.0,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Sampling runs; a trained pass wants about 20.")] = 1,
    seed: SeedOption = 0,
    lowering: LoweringOption = Lowering.inductor,
    device: DeviceOption = "cpu",
) -> None:
    """Find out, in a sampling run, what each denoising step may leave out; writes a plan."""
    if not out.expanduser().parent.is_dir():
        raise UsageMistake(f"--out {out}: there is no folder {out.expanduser().parent}; make it first")
    options = options_of(passes, lowering)
    from accelpass.api.calibration.step_search import search_steps as search
    from accelpass.cli.commands import sampling_command as body

    made = body.load(model, ask or [], steps, guidance, device)
    seeds = iter(range(seed, seed + runs))
    plan = search(
        made.model,
        lambda fast: made.sample(fast, next(seeds)),
        options.get("passes", []),
        scheduler=made.scheduler,
        steps=steps,
        runs=runs,
        options={"lowering": lowering.value},
    )
    plan.save(out)
    print(f"plan: {out}")
    print(f"see what it does: accelpass sample {model} --plan {out} --steps {steps}")


@guarded
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="digits-dit, or a diffusers pipeline's folder or id.")],
    passes: PassesOption = None,
    plan: PlanOption = None,
    out: Annotated[Path, typer.Option("--out", help="The images, plain above, with passes below.")] = Path(
        "sample.png"
    ),
    html: HtmlOption = None,
    steps: StepsOption = 50,
    ask: AskOption = None,
    guidance: GuidanceOption = 2.0,
    seed: SeedOption = 0,
    lowering: LoweringOption = Lowering.inductor,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Make images with and without passes, and say what they cost and how far apart they are."""
    output.check_page(html)
    options = options_of(passes, lowering)
    from accelpass.cli.commands import sampling_command as body

    if plan is not None:
        from accelpass.passes.core.plan import Plan

        options["plan"] = Plan.load(plan)
    with step(f"Loading {model}") as update:
        made = body.load(model, ask or [], steps, guidance, device)
        compared, report = body.compare(made, options, seed, update)
    sheet = body.sheet(compared, out)
    page = None if html is None else report.to_html(html)
    ratio = compared.fast_seconds / compared.dense_seconds
    figures = {"seconds": compared.fast_seconds, "dense_seconds": compared.dense_seconds, "psnr": compared.psnr}
    if as_json:
        output.as_json({"model": model, **figures, "images": str(sheet), **report.to_dict()})
        return
    output.show(report)
    print(f"a run takes {compared.fast_seconds:.2f} s, plainly compiled {compared.dense_seconds:.2f} s ({ratio:.2f}x)")
    print(f"PSNR against the plain images: {compared.psnr:.1f} dB")
    print(f"images: {sheet}" + (f"\nreport: {page}" if page else ""))


def register(app: typer.Typer) -> None:
    """Add both commands."""
    commands: dict[str, Callable[..., None]] = {"search-steps": search_steps, "sample": sample}
    for name, command in commands.items():
        app.command(name)(command)
