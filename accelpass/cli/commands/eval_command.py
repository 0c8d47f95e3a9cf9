"""What ``accelpass eval`` does: perplexity with and without passes, and how far the predictions are apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accelpass.cli import output, text_data
from accelpass.cli.loading import load, load_checkpoint, options_of
from accelpass.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Lowering,
    LoweringOption,
    ModelArgument,
    PassesOption,
    PlanOption,
)
from accelpass.cli.terminal import UsageMistake, guarded, step

if TYPE_CHECKING:
    from accelpass.api.quality.question_accuracy import Accuracy


@guarded
def evaluate(
    model: ModelArgument,
    passes: PassesOption = None,
    plan: PlanOption = None,
    data: text_data.DataOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens that are scored.")] = 4096,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens that are read at once.")] = 1024,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions", help='JSONL of {"question", "options", "answer"}: accuracy in place of perplexity.'
        ),
    ] = None,
    lowering: LoweringOption = Lowering.inductor,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Score a language model on text with and without passes: perplexity, agreement, divergence.

    A quantized checkpoint (GPTQ, AWQ, compressed-tensors folder, or a .gguf file) is scored from its own codes.
    """
    options = options_of(passes, lowering)
    text_data.checked(data)
    if questions is not None and not questions.is_file():
        raise UsageMistake(f"--questions {questions}: there is no such file")
    from accelpass.api.quality.question_accuracy import evaluate_questions, read_questions

    asked = None if questions is None else read_questions(questions)
    if plan is not None:
        from accelpass.passes.core.plan import Plan

        options["plan"] = Plan.load(plan)
    from accelpass.api.quality.evaluation import evaluate as scored
    from accelpass.checkpoints.building import is_checkpoint

    with step(f"Loading {model}", tokens if asked is None else len(asked)) as update:
        if is_checkpoint(model):
            if plan is not None:
                raise UsageMistake(f"--plan: {model} is a quantized checkpoint, which has a plan of its own")
            loaded, tokenizer, options["plan"] = load_checkpoint(model, dtype)
            loaded = loaded.to(device)
        else:
            loaded, tokenizer = load(model, device, dtype, generates=True)
        if asked is not None:
            if tokenizer is None:
                raise UsageMistake("the model has no tokenizer, so no question can be read")
            update(f"Asking {len(asked)} questions")
            _show(model, evaluate_questions(loaded, tokenizer, asked, options, update), as_json)
            return
        ids = text_data.ids_of(tokenizer, data)[:, :tokens].to(device)
        if ids.shape[1] < 2:
            raise UsageMistake(f"--data {data}: the text has {ids.shape[1]} tokens; two are needed")
        update(f"Scoring {ids.shape[1]} tokens")
        found = scored(loaded, ids, options, window, update)
    if as_json:
        output.as_json({"model": model, **found.to_dict()})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "perplexity", "agreement", "divergence", box=None, padding=(0, 3, 0, 0))
    table.add_row("without passes", f"{found.dense:.3f}", "", "")
    table.add_row("with", f"{found.perplexity:.3f}", f"{100 * found.agreement:.1f} %", f"{found.divergence:.4f} nats")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"perplexity is {found.ratio:.3f} of the dense model's, over {found.tokens} tokens")


def _show(model: str, found: Accuracy, as_json: bool) -> None:
    if as_json:
        output.as_json({"model": model, **found.to_dict()})
        return
    print(f"without passes {found.dense:7.1%} right ({found.dense_by_length:.1%} by length)")
    print(f"with           {found.accuracy:7.1%} right ({found.accuracy_by_length:.1%} by length)")
    print(f"the same option for {found.agreement:.1%} of {found.questions} questions")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command: Callable[..., None] = evaluate
    app.command("eval")(command)
