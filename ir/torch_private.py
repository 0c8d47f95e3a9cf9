"""Every private name of torch that this package uses: torch does not promise to keep them, and each has a test that fails when it moves.

What a graph's inputs come from is Dynamo's to say (sources); AOTAutograd takes an input for model state by a mark on its node.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import predispatch
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

__all__ = [
    "CLOSES_VMAP",
    "ENTER_AUTOCAST",
    "EXIT_AUTOCAST",
    "GET_DATA",
    "OPENS_VMAP",
    "RECOMPILATIONS",
    "SET_GRAD_ENABLED",
    "FakeTensor",
    "FakeTensorMode",
    "Frame",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "TracingContext",
    "allow_recompilations",
    "archive_writer",
    "assert_async",
    "closed_levels",
    "copy_sources",
    "cpu_multiplies_bfloat16",
    "cpu_multiplies_int8",
    "enable_python_dispatcher",
    "forget_compilations",
    "frame_of",
    "handles_of",
    "has_stopped_compiling",
    "int8_product",
    "is_model_state",
    "keystr",
    "library_runner",
    "mark_model_state",
    "mark_static",
    "name_buffers",
    "path_of",
    "recompile_limit",
    "source_name",
    "source_of",
    "switches_forward_gradients",
    "tensors_of",
    "traced_code",
    "traced_tensors",
    "tracing",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]

assert_async = torch._assert_async
"""A check of a tensor inside a graph that nobody waits for."""

ENTER_AUTOCAST, EXIT_AUTOCAST = _enter_autocast, _exit_autocast
GET_DATA: Any = getattr(torch._C._autograd, "_get_data_attr", None)
"""What ``tensor.data`` is in a graph; missing in some versions."""
OPENS_VMAP, CLOSES_VMAP = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
"""What opens and closes a level of ``vmap`` in a graph."""
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
RECOMPILATIONS = 256
"""Graphs of one function, from which on Dynamo runs it uncompiled. Its own default of 8 is for code that should not be compiled
anew; a model that serves prompts, answers and batches with caches of several sizes has a graph for each."""
_DEFAULT_LIMIT = 8
_TABLES = {"_parameters": "param", "_buffers": "buffer", "_modules": None}


def mark_static(tensor: torch.Tensor) -> None:
    """Let a tensor's sizes be constants of the graph that it is an input of."""
    torch._dynamo.mark_static(tensor)  # named here only: importing Dynamo takes seconds


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
    from torch._dynamo.symbolic_convert import InstructionTranslator

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
    from torch._dynamo.utils import get_compilation_metrics

    return {
        int(str(metric.compile_id).split("/")[0])
        for metric in get_compilation_metrics()
        if (metric.fail_reason or "").startswith("Dynamo recompile limit exceeded") and metric.compile_id
    }


def recompile_limit(count: int, of_all: int | None = None) -> AbstractContextManager[None]:
    """Within it Dynamo compiles a function up to ``count`` times, and functions of one piece of code ``of_all`` times."""
    further = {} if of_all is None else {"accumulated_recompile_limit": of_all}
    patched: AbstractContextManager[None] = torch._dynamo.config.patch({"recompile_limit": count, **further})
    return patched


def forget_compilations() -> None:
    """Let Dynamo compile every function anew."""
    torch._dynamo.reset()


def switches_forward_gradients(target: Any) -> bool:
    """Whether a function of a graph opens or enters a level of forward-mode gradients."""
    names = ("_enter_dual_level", "_jvp_increment_nesting")
    return target in [found for n in names if (found := getattr(predispatch, n, None)) is not None]


@contextmanager
def closed_levels() -> Iterator[None]:
    """Levels of ``vmap`` that were opened inside are closed at the end, also where what opened them has failed."""
    before = torch._C._functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        while (torch._C._functorch.maybe_current_level() or 0) > before:
            CLOSES_VMAP()


def source_of(node: fx.Node) -> Any:
    """Where Dynamo found an input; None where nobody said."""
    return getattr(node, "_dynamo_source", None)


def source_name(node: fx.Node) -> str:
    """Where Dynamo found an input, as Python would write it; empty where nobody said."""
    name = getattr(source_of(node), "name", "")
    return str(name() if callable(name) else name)  # a method before torch 2.12


def path_of(source: Any) -> tuple[str, str] | None:
    """(path, ``param`` or ``buffer``) of a Dynamo source, or None for anything that is not module state."""
    from torch._dynamo.source import AttrSource, DictGetItemSource

    parts: list[str] = []
    kind = None
    while source is not None:
        base = getattr(source, "base", None)
        table = getattr(base, "member", None)
        if isinstance(base, DictGetItemSource) and getattr(base.base, "member", None) == "__dict__":
            # A class with a __getattr__ of its own (diffusers' models): Dynamo looks the table up in __dict__.
            table, base = base.index, base.base
        if isinstance(source, DictGetItemSource) and table in _TABLES:
            parts.append(str(source.index))
            kind = kind or _TABLES[table]
            source = getattr(base, "base", None)
        elif kind and type(source) is AttrSource:
            parts.append(source.member)
            source = base
        elif kind:
            source = base
        else:
            return None
    return (".".join(reversed(parts)), kind) if kind else None


def copy_sources(nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Give each new input the source of the old one that it stands for."""
    for old, new in nodes.items():
        if old.op == "placeholder":
            new._dynamo_source = source_of(old)


def name_buffers(new: fx.GraphModule, old: fx.GraphModule | None = None) -> None:
    """Sources for the tensors that a graph module holds itself, which AOTAutograd asks for: those of ``old``, else their names."""
    from torch._dynamo.source import ConstantSource

    sources: dict[str, Any] = dict(getattr(old, "_param_name_to_source", {}))
    for name, _ in new.named_buffers():
        sources.setdefault(name, ConstantSource(name))
    new._param_name_to_source = sources  # type: ignore[assignment]


def is_model_state(node: fx.Node) -> bool:
    """Whether an input is one of the model's own tensors, not what its caller passes."""
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def mark_model_state(node: fx.Node) -> None:
    """Let AOTAutograd take a new input for one of the model's own tensors."""
    node._dynamo_source = None  # AOTAutograd insists on the attribute; None is allowed
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def traced_code() -> CodeType | None:
    """The code that Dynamo is compiling: what remains of a function after a graph break is code of its own."""
    return next(iter(TracingContext.get_traced_code() or ()), None)


def traced_tensors() -> Mapping[Tensor, Any]:
    """The tensors that Dynamo has seen in the compilation under way."""
    context = TracingContext.try_get()
    return context.tensor_to_context if context is not None else {}


def let_graphs_compute_sizes(mode: FakeTensorMode) -> None:
    """Let a graph of this mode read a number that it has computed as a size, and let the compiler behind us do the same."""
    context = TracingContext.try_get()
    for one in (mode, context.fake_mode if context is not None else None):
        if one is not None:
            one.allow_scalar_outputs = True


def archive_writer(path: str) -> Any:
    """Writes an archive in torch's format: a zip file, nothing compressed, each record at a multiple of 64 bytes."""
    from torch.export.pt2_archive import PT2ArchiveWriter

    return PT2ArchiveWriter(path)


def library_runner(path: str, runners: int) -> Any:
    """What runs a library that AOTInductor compiled for the CPU; ``runners`` calls at once, and no compiler is imported."""
    return torch._C._aoti.AOTIModelContainerRunnerCpu(path, runners)


def handles_of(tensors: Sequence[Tensor]) -> tuple[list[int], list[Any]]:
    """A handle for each tensor, as compiled libraries take them, and what Python holds it by; whoever is given one owns it."""
    held: list[Any] = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return [pointer(capsule, None) for capsule in held], held


def tensors_of(handles: Sequence[int], held: Sequence[Any] | None = None) -> list[Tensor]:
    """The tensors behind handles, which are gone then."""
    if held is None:
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        held = [capsule(handle, None, None) for handle in handles]
    made: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(list(held))
    return made


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return fast and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_multiplies_int8() -> bool:
    """Whether this processor has instructions for products of eight-bit integers."""
    return torch.cpu._is_vnni_supported()


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of int8 matrices, exact in int32."""
    return torch._int_mm(a, b)
