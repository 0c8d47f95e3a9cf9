"""A model compiled once into a file, and the file opened to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from accelpass.backends.package.decoder import PackagedDecoder
    from accelpass.backends.package.denoiser import PackagedDenoiser
    from accelpass.backends.package.model import PackagedModel
    from accelpass.backends.package.report import PackageReport


def package(
    model: torch.nn.Module,
    example: Any,
    passes: Sequence[Any] | None = None,
    *,
    path: str | os.PathLike[str],
    cache: Any = None,
    dynamic_shapes: Any = None,
    plan: Any = None,
    decode: Mapping[str, Any] | None = None,
    skip_sites: Mapping[str, Sequence[str]] | None = None,
    inductor: Mapping[str, Any] | None = None,
    verify: bool = True,
    debug: bool = False,
    steps: int | None = None,
    tokenizer: Any = None,
) -> PackageReport:
    """Compile ``model`` with ``passes`` ahead of time and write it as one file, which :func:`accelpass.open` runs without a compiler.

    Passes that ``torch.compile(backend="accelpass")`` has by default run here, too. Equal weights of several graphs are in
    the file once. The model itself is not changed.

    Args:
        model: in eval mode, on the CPU.
        example: an example call: keyword arguments, a tuple of positional ones, or one tensor; of a decoder a prompt of two tokens
            or more, for as many sequences as the package is to take at once.
        passes: names, ``{"name": ..., option: value}`` or pass objects; an empty list leaves out those that are on by default, too.
        path: ends in ``.pt2``.
        cache: of a language model, how many tokens of prompt and answer there is room for, or an empty ``accelpass.KVCache``. Two
            graphs are compiled then, the prompt's and that of one token; the package keeps keys and values between them.
        dynamic_shapes: as ``torch.export`` takes it, by argument name: ``{"x": {0: "batch"}}``. A prompt's length is dynamic.
        plan: a plan, or the path of one.
        decode: the arguments of a call for one more token, where they are not the prompt's cut to one token.
        skip_sites: by name of a pass, sites that it leaves alone.
        inductor: settings of ``torch._inductor.config``.
        verify: compare the compiled graphs with torch, at the example's sizes and at others.
        steps: how many model calls a sampling run has, for a pass that works across denoising steps and whose plan does not say. One
            graph is compiled for each way of computing a step, and what is opened tells a call's step from timestep and latents.
        tokenizer: of a language model, to be in the file, too: a fast tokenizer of transformers, a ``tokenizers.Tokenizer``, or the path
            of a ``tokenizer.json``. What is opened has it as ``tokenizer``, without transformers.
        debug: write the graph before and after each pass, as ``options={"debug": True}`` does.

    Raises:
        ExportError: the model, a pass or the file is in the way; says what to do. Nothing is left behind.
        CompilerMissingError: there is no C++ compiler that works.
        OptionError: a pass or option that does not exist.
        PassError: a pass failed.
    """
    from accelpass.backends.package.writing import package as write
    from accelpass.backends.package.writing import wanted

    chosen = wanted(passes, plan, skip_sites, debug)
    return write(
        model, example, path, chosen, cache, dynamic_shapes, decode, inductor, verify, steps=steps, tokenizer=tokenizer
    )


def open(path: str | os.PathLike[str], *, threads: int = 8) -> PackagedModel | PackagedDecoder | PackagedDenoiser:
    """Open a package: what it returns is called as the model was, or has ``generate`` where it holds a decoder.

    A model that samples in steps is called once for each, and remembers between them what its passes keep.

    The file is checked before anything in it is loaded, and nothing in it is unpickled. Its libraries are machine code all the
    same: open packages that you trust as you trust a program.

    Args:
        threads: how many calls may run at once; more wait for one that ends.

    Raises:
        DamagedPackageError: it is no package, cut short, or changed after it was written.
        TorchMismatchError: it is for another version of torch.
        ProcessorMismatchError: it is for a processor with instructions that this one does not have.
        PackageError: there is no such file.
    """
    from accelpass.backends.package.opened import opened

    return opened(path, threads)
