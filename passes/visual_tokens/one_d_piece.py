"""One-D-Piece: an image tokenizer's decoder reads the first codes of an image alone, as many as are wanted (arXiv 2501.10064)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.analyses.code_sequences import CodeSequence, code_sequences
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.splice import all_or_nothing
from accelpass.ir.transform.steps import StepBlock
from accelpass.passes.core.staged import FULL, Site, StagedCall, StagedPass, appending, put
from accelpass.passes.structure.decoder_blocks import drop_dead

_WANTED: ContextVar[int | None] = ContextVar("image_codes", default=None)


@contextmanager
def image_codes(count: int) -> Iterator[None]:
    """Let calls inside read the first ``count`` codes of each image: the next larger of the ``lengths`` that were compiled.

    Raises:
        OptionError: fewer than one.
    """
    if count < 1:
        raise OptionError(f"count={count} codes of an image are not supported; use a number from 1")
    held = _WANTED.set(count)
    try:
        yield
    finally:
        _WANTED.reset(held)


@dataclass(frozen=True)
class OneDPiece(StagedPass):
    """Cut the sequence of codes that an image is decoded from to its first ones, as a tokenizer trained by tail token drop allows.

    Miwa et al., "One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression". Training keeps a random number of first codes,
    which pushes what matters to the head of the sequence; any number of them is then an image, at so many times the bits of a
    code. Everything after the encoder is computed for these alone: distances to the codebook, positions, and the decoder's
    blocks, whose sequence is shorter. Codes that the graph returns are returned whole, and the encoder runs as it did.

    With ``lengths`` each of them is compiled, and ``image_codes`` chooses at each call; an encoder in the same graph is compiled once.
    A tokenizer that was not trained for it draws worse images.

    Attributes:
        length: how many codes are read where nothing else is chosen; 256 are all of the paper's.
        lengths: further numbers that a call may choose, ascending (the paper evaluates powers of two).

    Raises:
        OptionError: a number out of range.
    """

    length: int = 128
    lengths: tuple[int, ...] = ()

    name: ClassVar[str] = "one_d_piece"
    summary: ClassVar[str] = "decode an image from the first codes of its sequence alone"
    paper: ClassVar[str] = "One-D-Piece, arXiv 2501.10064"
    phase: ClassVar[str] = "structure"
    identity: ClassVar[dict[str, Any] | None] = {"length": 1 << 16, "lengths": ()}
    nothing: ClassVar[str] = "no codes of an image are joined with learnt tokens in this graph (a decoder as TiTok's)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise self.fail("length", "a number of codes, at least 1")
        if any(b <= a for a, b in zip((0, *self.lengths), self.lengths, strict=False)):
            raise self.fail("lengths", "ascending numbers of codes, from 1")

    @property
    def offered(self) -> list[int]:
        """The numbers of codes that a call may ask for, ascending."""
        return sorted({self.length, *self.lengths})

    def counts(self, full: int) -> list[int]:
        """The numbers of codes that a call may read, ascending."""
        return sorted({min(n, full) for n in self.offered})

    def stack(self, program: Program) -> Sequence[StepBlock]:
        found = program.analysis(code_sequences)
        chooses = program.frontend != "export" and len(found) == 1 and len(self.counts(found[0].count)) > 1
        return [site.block for site in self.find(program)] if chooses else ()

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(block.path, block) for block in blocks]

    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        return [(str(n),) for n in self.offered]

    def find(self, program: Program) -> list[Site]:
        found: list[CodeSequence] = program.analysis(code_sequences)
        if len(found) != 1:
            return []
        (one,) = found
        return self.places([StepBlock(0, one.path, (one.roots[0],), one.results, (), one.region)])

    def whole(self, program: Program, sites: Sequence[Any]) -> str | None:
        if len(found := program.analysis(code_sequences)) > 1:
            return f"codes enter in {len(found)} places; one is needed"
        return super().whole(program, sites)

    def asked(self, program: Program, site: Site) -> str:
        return program.actions[self.name][site.path] if self.name in program.actions else str(self.length)

    def acted(self, program: Program, site: Site, action: str) -> str:
        (found,) = program.analysis(code_sequences)
        count = int(action)
        if count >= found.count:
            raise CannotResize(f"all {found.count} codes of an image are read")
        with all_or_nothing(program):
            new = _on_first(program, found, count)
            put(site, new)
        drop_dead(program, site)
        program.changed()
        counts = [n for n in self.counts(found.count) if n < found.count] if self.name in program.actions else [count]
        bits = [math.ceil(n * math.log2(found.vocabulary)) for n in counts]
        shown = [" or ".join(map(str, numbers)) for numbers in (counts, bits)]
        return f"{shown[0]} of {found.count} codes are read, {shown[1]} bits of an image"

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        wanted = _WANTED.get() or self.length
        at_least = [n for n in self.offered if n >= wanted]
        call.run(0, str(at_least[0]) if at_least else FULL)
        return call.results()


def _on_first(program: Program, found: CodeSequence, count: int) -> list[fx.Node]:
    """What the graph returns of a sequence's first codes.

    Raises:
        CannotResize: something else than the learnt tokens is returned, or read in another way.
    """

    def first(node: fx.Node, dim: int) -> fx.Node:
        return call(program.graph, node, aten.slice.Tensor, node, dim, 0, count)

    with appending(max(found.results)):
        resizer = Resizer(program.graph, program.analysis(axes), found.dim, count, first, anew=True)
        new = resizer.copy(found.region, found.results)
    for old, node in zip(found.results, new, strict=True):
        if value(old).shape != value(node).shape:
            raise CannotResize(f"{old.name}, which the graph returns, has a row for each code")
    return new
