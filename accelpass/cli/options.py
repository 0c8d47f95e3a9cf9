"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Lowering(StrEnum):
    """Mirrors accelpass.passes.core.options.LOWERINGS, which cannot be imported here without importing torch."""

    inductor = "inductor"
    aten = "aten"
    eager = "eager"


class Dtype(StrEnum):
    """Float types that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Zoo name, local Hugging Face folder, or hub id.")]
PassesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--passes",
        "--pass",
        help="NAME, or NAME:key=value,key=value; repeatable. Several names parted by commas. 'none' for no pass. "
        'Lists inside a value are parted by |. JSON is taken, too: \'[{"name": "int4_weights", "group_size": 32}]\'.',
    ),
]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="A plan from calibrate or search-steps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write the report as a page to this file.")]
LoweringOption = Annotated[Lowering, typer.Option("--lowering", help="'eager' runs the rewritten graph uncompiled.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Float type to load the model in.")]
DeviceOption = Annotated[str, typer.Option("--device", help="'cpu', 'cuda', ...")]
QUESTION = "What is the capital of France?"
"""What is asked where no prompt is given."""
PromptOption = Annotated[str, typer.Option("--prompt", help="What to ask.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")]
GuidanceOption = Annotated[float, typer.Option("--guidance", min=1, help="Guidance scale; 1 for none.")]
AskOption = Annotated[list[str] | None, typer.Option("--ask", help="A class or a prompt; once for each image.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the first noise.")]
