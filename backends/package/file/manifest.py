"""What a package says of itself: read and checked before anything in it is loaded."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from accelpass.backends.package.errors import DamagedPackageError, ProcessorMismatchError, TorchMismatchError
from accelpass.backends.package.file import processor

FORMAT = 1
FOLDER = "data/accelpass/"
MANIFEST, DIGEST, WEIGHTS, LAYOUT, TOKENIZER = (
    FOLDER + name for name in ("manifest.json", "manifest.sha256", "weights.bin", "layout.txt", "tokenizer.json")
)
LIBRARIES = "data/aotinductor/"
"""Each graph's files are in a folder of its name in here, where torch's own loader looks."""


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dimension that may differ from call to call; ``most`` is None where nothing limits it."""

    name: str
    least: int
    most: int | None = None


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that goes into a graph."""

    name: str
    dtype: str
    shape: list[int | Size]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that calls write to, and what it is filled with at the beginning."""

    name: str
    dtype: str
    shape: list[int]
    fill: float


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor in the file of weights; ``offset`` is in bytes."""

    dtype: str
    shape: list[int]
    offset: int


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One compiled graph: it takes ``inputs``, then every state.

    Attributes:
        constants: by the library's name of a constant, the weight.
    """

    inputs: list[Value]
    outputs: list[str]
    constants: dict[str, str]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in the package."""

    bytes: int
    sha256: str


class Decoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What generating needs.

    Attributes:
        capacity, batch: there is room for so many tokens of so many sequences.
        ids: the name of the input that takes tokens.
        logits: the name of the output that a token is chosen from.
        eos, pad: tokens that end an answer, and the one that fills up what has ended.
        vocabulary: token ids are below it; a library does not survive a look-up beyond its table.
        keeps_all: no pass decides at the prompt's end what of it is kept, so that an answer may begin without a prompt's graph.
    """

    capacity: int
    batch: int
    ids: str
    logits: str
    eos: list[int]
    pad: int | None
    vocabulary: int | None
    keeps_all: bool


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a graph's input comes from that is not the caller's: ``state``, what an earlier call kept, or ``plan``.

    Attributes:
        first: it is what the first call of a step kept, not this one.
    """

    kind: str
    name: str
    first: bool = False


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sampling run needs: which graph computes which step. The first one reads nothing that was kept.

    Attributes:
        latents, time: names of the inputs that tell the run and its step.
        timesteps: those that the schedule was made for; empty if it fits any.
        calls: by step and call of the step, the graph; a call beyond these is as the last.
        most: calls that a step has, if that is known.
        exact_age: what is read must be of the very step that the schedule means, and not of a later one.
        sources: by graph and input.
        operands: by ``STEP/NAME`` the weight that holds a tensor of the plan.
    """

    latents: str
    time: str
    timesteps: list[float]
    calls: list[list[str]]
    most: int | None
    exact_age: bool
    sources: dict[str, dict[str, Source]]
    operands: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it.

    Attributes:
        graphs: ``model``; of a decoder ``prompt`` and ``decode``; of a schedule one for each way of computing a step.
        instructions: see :func:`accelpass.backends.package.file.processor.instructions`.
        members: every other file of the package.
        report: what the passes did, for people.
    """

    format: int
    accelpass: str
    torch: str
    machine: str
    instructions: list[str]
    passes: list[dict[str, Any]]
    graphs: dict[str, Graph]
    states: list[State]
    weights: dict[str, Weight]
    members: dict[str, Member]
    decoder: Decoder | None = None
    schedule: Schedule | None = None
    report: dict[str, Any] = {}


def layout(manifest: Manifest) -> str:
    """What a program without a JSON reader needs of a decoder's manifest: a line for each thing, words parted by blanks.

    ``decoder CAPACITY BATCH``, ``logits GRAPH NUMBER`` (of the output), ``state DTYPE FILL SIZE...``, ``weight NAME DTYPE OFFSET
    SIZE...`` and ``constant GRAPH NAME WEIGHT``, in which the weight comes earlier.
    """
    about = manifest.decoder
    assert about is not None
    lines = [f"decoder {about.capacity} {about.batch}"]
    lines += [f"logits {name} {graph.outputs.index(about.logits)}" for name, graph in manifest.graphs.items()]
    lines += [" ".join(map(str, ("state", s.dtype, s.fill, *s.shape))) for s in manifest.states]
    lines += [" ".join(map(str, ("weight", n, w.dtype, w.offset, *w.shape))) for n, w in manifest.weights.items()]
    lines += [f"constant {g} {n} {w}" for g, graph in manifest.graphs.items() for n, w in graph.constants.items()]
    return "\n".join(lines) + "\n"


def parsed(text: bytes, where: str) -> Manifest:
    """The manifest of the package ``where``.

    Raises:
        DamagedPackageError: it is none, or of a later format.
    """
    try:
        made = msgspec.json.decode(text, type=Manifest)
    except msgspec.MsgspecError as cause:
        raise DamagedPackageError(f"{where}: its manifest is not one that this accelpass reads: {cause}") from cause
    if made.format != FORMAT:
        raise DamagedPackageError(
            f"{where} has format {made.format}, and this accelpass reads {FORMAT}; install accelpass=={made.accelpass}"
        )
    return made


def refuse_elsewhere(manifest: Manifest, where: str) -> None:
    """Refuse a package that this torch, or this machine, cannot run.

    Raises:
        TorchMismatchError: it is for another version.
        ProcessorMismatchError: it is for another processor.
    """
    if manifest.torch != torch.__version__:
        raise TorchMismatchError(
            f"{where} is for torch {manifest.torch}, and this is {torch.__version__}; package the model again, or type: "
            f"pip install torch=={manifest.torch.partition('+')[0]}"
        )
    if manifest.machine != (here := processor.machine()):
        raise ProcessorMismatchError(
            f"{where} was compiled for {manifest.machine}, and this is {here}; package the model on this machine"
        )
    missing = sorted(set(manifest.instructions).difference(processor.instructions()))
    if missing:
        raise ProcessorMismatchError(
            f"{where} was compiled for a processor with {', '.join(missing)}, which this one does not have; package the model on "
            "this machine, or on the oldest that is to run it"
        )
