"""What ``accelpass quantize`` does: calibrate a method on text, pack the weights, and write a folder for ``accelpass.load``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accelpass.cli import output, text_data
from accelpass.cli.loading import load, load_checkpoint
from accelpass.cli.options import Dtype, DtypeOption, JsonOption, ModelArgument
from accelpass.cli.terminal import UsageMistake, guarded, step

BITS: dict[str, tuple[float, ...]] = {
    "int4_weights": (4,), "hqq": (4,), "awq": (4,), "gptq": (3, 4), "int8_weights": (8,), "int8_dynamic": (8,), "int8_static": (8,), "smoothquant": (8,),
}  # fmt: skip
"""By method, the bits that it has; ``mixed_precision`` takes any average."""
LEARN = ("awq", "gptq", "smoothquant", "int8_static", "mixed_precision")
CODES = "prequantized"
"""What runs a checkpoint that is quantized already."""
ENDS = "lm_head|embed_tokens"


@guarded
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder, which accelpass.load reads.")],
    bits: Annotated[float, typer.Option("--bits", help="Of a weight; an average for mixed_precision.")] = 4,
    method: Annotated[
        str | None, typer.Option("--method", help=", ".join((*BITS, "mixed_precision")) + "; gptq by default.")
    ] = None,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Input channels that share a scale: 32, 64, 128.")
    ] = 64,
    exclude: Annotated[
        str,
        typer.Option(
            "--exclude", help="Patterns of weights that stay, parted by |; the head and embedding by default."
        ),
    ] = ENDS,
    data: text_data.DataOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Pieces of text that are learnt from.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="In each of them.")] = 512,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Of mixed_precision: a .png of the format of each weight.")
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
) -> None:
    """Pack a model's weights in few bits, fitted to text, and save them: accelpass.load(model, FOLDER) runs them.

    A run that is interrupted goes on after the last finished block when it is typed again: they are kept in FOLDER.partial.

    MODEL may be a quantized checkpoint (GPTQ, AWQ, compressed-tensors folder, or a .gguf file): its codes are kept as they are.
    """
    from accelpass.checkpoints.building import is_checkpoint

    stored = is_checkpoint(model)
    if stored and method is not None:
        raise UsageMistake(f"--method {method}: {model} is quantized already; without --method its codes are kept")
    method = CODES if stored else method or "gptq"
    entry = {"name": CODES} if stored else entry_of(method, bits, group_size, exclude)
    text_data.checked(data)
    if picture is not None:
        if method != "mixed_precision":
            raise UsageMistake(f"--picture {picture}: {method} stores all weights alike; it is for mixed_precision")
        from accelpass.view.pictures.drawing import check_target

        check_target(picture, (".png",))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageMistake(f"-o {out} is there and not empty; name a new folder")
    import torch

    import accelpass

    with step(f"Loading {model}") as update:
        if stored:
            loaded, tokenizer, plan = load_checkpoint(model, dtype)
        else:
            loaded, tokenizer = load(model, "cpu", dtype)
        ids = torch.zeros(1, 2, dtype=torch.long) if stored else text_data.ids_of(tokenizer, data)
        pieces = [part for part in ids.split(tokens, 1)[:samples] if part.shape[1] == tokens]
        if method in LEARN and not pieces:
            raise UsageMistake(
                f"the text has {ids.shape[1]} tokens, and one piece needs {tokens}; use --tokens or more text"
            )
        update(f"{method}: {len(pieces)} pieces of {tokens} tokens" if method in LEARN else f"Packing by {method}")
    options: dict[str, Any] = (
        {"lowering": "eager", "plan": plan} if stored else {"lowering": "eager", "passes": [entry]}
    )
    if method in LEARN:
        begun = out.with_name(out.name + ".partial")  # an interrupted run goes on from there
        if not as_json and (done := len(list(begun.glob("*.safetensors")))):
            print(f"{begun} has {done} finished blocks; going on after them")
        plan = accelpass.calibrate(loaded, pieces, [entry], progress=not as_json, resume=begun)
        options = {"lowering": "eager", "plan": plan}
    if picture is not None:
        accelpass.draw_bits(plan, picture, model)
    with step("Packing") as update:
        fast = torch.compile(loaded, backend="accelpass", options=options)
        with torch.no_grad():
            fast(ids[:, :2])
        report = accelpass.explain(fast)
        update(f"Writing {out}")
        accelpass.save(fast, out)
    if method in LEARN:
        shutil.rmtree(begun)
    before, after = report.weight_bytes
    taken = len(report.passes[method].took)
    if as_json:
        size = sum(f.stat().st_size for f in out.rglob("*"))
        output.as_json(
            {
                "model": model,
                "method": method,
                "sites": taken,
                "bytes_before": before,
                "bytes_after": after,
                "folder": size,
            }
        )
        return
    from accelpass.view.text import ratio
    from accelpass.view.text import size as sized

    print(f"{method}: {taken} weights, {sized(before)} -> {sized(after)}{ratio(before, after)}")
    for site, why in report.passes[method].skipped.items():
        print(f"  left: {site}: {why}")
    print(f"saved in {out}; run it with accelpass.load(model, {str(out)!r}), score it with accelpass eval")


def entry_of(method: str, bits: float, group_size: int, exclude: str) -> dict[str, Any]:
    """The pass that a method and bits mean.

    Raises:
        UsageMistake: no such method, or not in so many bits.
        OptionError: a group size that there is not.
    """
    from accelpass.passes.core.registry import make

    entry: dict[str, Any] = {"name": method, "exclude": [f"*{p}*" for p in exclude.split("|") if p]}
    if method == "mixed_precision":
        entry |= {"bits": float(bits), "group_size": group_size}
    elif method not in BITS:
        raise UsageMistake(f"--method {method}: there are {', '.join((*BITS, 'mixed_precision'))}")
    elif bits not in BITS[method]:
        has = " and ".join(f"{b:g}" for b in BITS[method])
        raise UsageMistake(f"--bits {bits:g}: {method} has {has}; mixed_precision takes any average")
    else:
        entry |= {"bits": int(bits)} if method == "gptq" else {}
        entry |= {"group_size": group_size} if min(BITS[method]) < 8 else {}
    make(entry)
    return entry


def register(app: typer.Typer) -> None:
    """Add the command."""
    command: Callable[..., None] = quantize
    app.command("quantize")(command)
