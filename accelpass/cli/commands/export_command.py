"""What ``accelpass export`` does: an example call is made, the rest is ``export_onnx``.

A language model is called with a sentence; of a pipeline that makes images, the call is the one that it makes itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelpass.cli import output
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
from accelpass.cli.terminal import UsageMistake, guarded, step

if TYPE_CHECKING:
    from accelpass.backends.onnx.report import ExportReport
    from accelpass.cli.commands.sampling_command import Pipeline

EXAMPLE = "The quick brown fox jumps over the lazy dog."
STEPS = 50


@guarded
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file, NAME.onnx.")],
    passes: PassesOption = None,
    cache: Annotated[
        int | None,
        typer.Option(
            "--cache",
            min=2,
            help="Tokens of a key/value cache: writes NAME.prompt.onnx, NAME.decode.onnx and NAME.json.",
        ),
    ] = None,
    plan: PlanOption = None,
    opset: Annotated[int, typer.Option("--opset", help="18 to 23; packed weights need 21.")] = 23,
    contrib: Annotated[
        bool, typer.Option("--contrib", help="ONNX Runtime's own operators (MatMulNBits); no other runtime reads them.")
    ] = False,
    activations: Annotated[
        str,
        typer.Option(
            "--activations", help="'int8' lets ONNX Runtime round them, 'qdq' the file: faster, other numbers."
        ),
    ] = "float32",
    texts: Annotated[
        Path | None,
        typer.Option("--texts", help="Of --activations qdq: a text file, each of whose lines is read for the ranges."),
    ] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights in NAME.onnx.data; by itself for more than 2 GB.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with torch.")] = True,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps: those of the plan, or 50.")
    ] = None,
    ask: AskOption = None,
    guidance: GuidanceOption = 2.0,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
) -> None:
    """Write the model with the passes applied as ONNX, checked against torch.

    Of what makes images (digits-dit, a diffusers pipeline's folder or id) it is the transformer; --steps, --ask and
    --guidance say what a run is, as for accelpass sample.
    """
    import torch

    from accelpass.backends.onnx.errors import PACKAGES, require_packages
    from accelpass.cli.arguments import passes_from

    require_packages(*(PACKAGES if verify else PACKAGES[:2]))
    from accelpass.backends.export.files import writable
    from accelpass.backends.onnx.export import export as write
    from accelpass.backends.onnx.export import wanted
    from accelpass.models_zoo import resolve

    want = wanted(passes_from(passes or []) or (), plan, opset, contrib, activations)
    writable(out, ".onnx")
    if texts is not None and not texts.is_file():
        raise UsageMistake(f"--texts {texts}: there is no such file")
    lines = [] if texts is None else [line for line in texts.read_text().splitlines() if line.strip()]
    with step(f"Loading {model}") as update:
        if ask or makes_images(model):
            if cache is not None or lines:
                wrong = "--texts" if cache is None else "--cache"
                raise UsageMistake(f"{wrong}: this model makes images; leave {wrong} out")
            loaded, args, kwargs = first_step(model, ask, steps, guidance, dtype.value, update)
            shapes = None
            calls: list[dict[str, Any]] = []
            steps = steps if steps or plan is not None else STEPS
        else:
            loaded, tokenizer = resolve(model, getattr(torch, dtype.value))
            args, (kwargs, shapes) = (), example(loaded, tokenizer, cache)
            calls = [read(tokenizer, line, kwargs) for line in lines]
        report = write(
            loaded, args, out, want, kwargs, shapes, external_data or None, verify, None, update, steps, calls
        )
    if as_json:
        output.as_json({"model": model, **report.to_dict()})
    else:
        told(report)


def first_step(
    model: str, ask: list[str] | None, steps: int | None, guidance: float, dtype: str, update: Callable[[str], None]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The transformer of what makes images, and the arguments of a run's first step."""
    import torch

    from accelpass.cli.commands.sampling_command import load as pipeline

    made = pipeline(model, ask or [], steps or STEPS, guidance, "cpu")
    made.pipe.to(dtype=getattr(torch, dtype))
    update("The first step of a run")
    return (made.model, *first_call(made))


def example(model: Any, tokenizer: Any, cache: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of an example call, and which of their dimensions are free.

    Raises:
        UsageMistake: a cache for a model that generates nothing.
    """
    takes = inspect.signature(model.forward).parameters
    given = dict(tokenizer(EXAMPLE, return_tensors="pt"))
    if cache is not None:
        if not getattr(model, "can_generate", lambda: False)():
            raise UsageMistake("--cache: this model generates no text; leave --cache out")
        import accelpass

        ids = given["input_ids"][:, : cache - 1]
        kwargs = {"input_ids": ids, "past_key_values": accelpass.KVCache(model, capacity=cache)}
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        return {**kwargs, **last}, {"input_ids": {1: "tokens"}}
    names = ("input_ids", "attention_mask", "token_type_ids") if "token_type_ids" in given else ("input_ids",)
    if not getattr(model, "can_generate", lambda: False)():
        names = ("input_ids", "attention_mask", "token_type_ids")  # a batch of sentences is padded
    tensors = {name: given[name].repeat(2, 1) for name in names if name in given and name in takes}
    plain = {"use_cache": False} if "use_cache" in takes else {}
    return {**tensors, **plain}, {name: {0: "batch", 1: "tokens"} for name in tensors}


def read(tokenizer: Any, line: str, like: dict[str, Any]) -> dict[str, Any]:
    """Arguments for one line of text, those of ``like`` that are tensors."""
    given = tokenizer(line, return_tensors="pt")
    return {name: given[name].repeat(len(t), 1) for name, t in like.items() if name in given and hasattr(t, "shape")}


def makes_images(name: str) -> bool:
    """Whether a name is that of a pipeline: of the zoo, or a folder that diffusers wrote."""
    from accelpass.models_zoo import ZOO

    return (name in ZOO and ZOO[name].task == "image") or (Path(name).expanduser() / "model_index.json").is_file()


def first_call(made: Pipeline) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline gives its transformer at the first step of a run."""

    class Seen(Exception):
        pass

    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise Seen

    handle = made.model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        made.sample(made.model, 0)
    except Seen:
        return given[0]
    finally:
        handle.remove()
    raise UsageMistake("the pipeline made its images without calling its transformer; there is nothing to export")


def told(report: ExportReport) -> None:
    """Print what was written and what each pass did, as a table."""
    from rich.console import Console
    from rich.text import Text

    from accelpass.view.text import ratio, size

    console = Console(highlight=False)
    output.print_passes(console, report.records)
    paths = [f.path for f in report.files] + [p for p in (report.data, report.manifest) if p is not None]
    for path in paths:
        console.print(Text(f"{path}  {size(path.stat().st_size)}"), soft_wrap=True)
    before, after = report.weights_before, report.weights_after
    console.print(f"weights: {size(before)} -> {size(after)}{ratio(before, after)}; opset {report.opset}")
    if report.difference is not None:
        console.print(f"ONNX Runtime and torch differ by {report.difference:.1e} of the largest value")
    for note in report.notes:
        console.print(Text(note), soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command."""
    command: Callable[..., None] = export
    app.command("export")(command)
