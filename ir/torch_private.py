"""What is read of Dynamo's own state, which torch does not promise to keep; each has a test that fails when it moves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_compilation_metrics

RECOMPILATIONS = 256
"""Graphs of one function, from which on Dynamo runs it uncompiled. Its own default of 8 is for code that should not be compiled
anew; a model that serves prompts, answers and batches with caches of several sizes has a graph for each."""
_DEFAULT_LIMIT = 8


@dataclass(frozen=True)
class Frame:
    """The Python function that a graph was made of.

    Attributes:
        name: as its code is called: ``Block.forward``.
        place: file and line.
        number: Dynamo's number of the function; None where that is not told.
        compilation: how often the function was compiled before.
        module: whose method it is, if it is a module's.
    """

    name: str
    place: str
    number: int | None
    compilation: int
    module: weakref.ref[nn.Module] | None

    @property
    def is_last(self) -> bool:
        """Whether Dynamo will compile the function no further."""
        return self.compilation + 1 >= torch._dynamo.config.recompile_limit

    @property
    def is_past_limit(self) -> bool:
        """Whether a call fitted none of the function's graphs when no more were compiled."""
        return self.number is not None and self.number in _stopped()


def frame_of(gm: fx.GraphModule) -> Frame | None:
    """The function that Dynamo is compiling; None outside of Dynamo."""
    try:
        translator: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None
    code = translator.f_code
    number, compilation = None, 0
    identity = gm.meta.get("dynamo_compile_id")
    if identity is not None and identity.frame_id is not None:
        number, compilation = identity.frame_id, identity.frame_compile_id or 0
    owner = translator.f_locals.get("self")
    module = weakref.ref(owner) if isinstance(owner, nn.Module) else None
    return Frame(code.co_qualname, f"{code.co_filename}:{code.co_firstlineno}", number, compilation, module)


def allow_recompilations() -> None:
    """Let Dynamo compile a function more than eight times, unless somebody has set the limit."""
    if torch._dynamo.config.recompile_limit == _DEFAULT_LIMIT:
        torch._dynamo.config.recompile_limit = RECOMPILATIONS


def has_stopped_compiling() -> bool:
    """Whether Dynamo has run some function uncompiled because it was compiled too often."""
    return bool(_stopped())


def _stopped() -> set[int]:
    """Numbers of the functions that reached the limit, among those that were compiled lately."""
    return {
        int(str(metric.compile_id).split("/")[0])
        for metric in get_compilation_metrics()
        if (metric.fail_reason or "").startswith("Dynamo recompile limit exceeded") and metric.compile_id
    }
