"""From what ``torch.compile`` returned back to the graphs that were compiled for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from accelpass.backends import CompiledGraph, backend, compiled_graphs
from accelpass.ir.errors import AccelpassError


class NotCompiled(AccelpassError):
    """The thing was never compiled, not by accelpass, or was not called yet."""


@dataclass(frozen=True)
class Execution:
    """A graph as one part of a model runs it: Dynamo shares a graph among equal blocks, hooked layers and instances of a class.

    Attributes:
        tensors: identities of the model's tensors that the graph reads there.
        inside: where the part is in the model, and what it is called in the graph; both empty if paths are the model's.
    """

    graph: CompiledGraph
    tensors: frozenset[int]
    inside: tuple[str, str] = ("", "")

    def site(self, name: str) -> str:
        """A site of the graph as the model's owner would name it."""
        prefix, own = self.inside
        if name.startswith("("):
            return name
        name = name if not own else name.removeprefix(own).removeprefix(".")
        return ".".join(filter(None, (prefix, name)))


@dataclass(frozen=True)
class Found:
    """A compiled model and its graphs.

    Attributes:
        modules: the modules behind it: one for a compiled module; what a compiled function closes over.
        graphs: oldest first.
        executions: the parts of the model that ran each of them, if any did.
        shared: the graphs were compiled for another instance of the class, which Dynamo shares.
    """

    modules: tuple[nn.Module, ...]
    graphs: tuple[CompiledGraph, ...]
    executions: tuple[Execution, ...] = ()
    shared: bool = False

    @property
    def module(self) -> nn.Module | None:
        return self.modules[0] if len(self.modules) == 1 else None


def find(fast: Any) -> Found:
    """The graphs of ``fast``.

    A graph belongs to it if the options are equal and it reads the same parameters. If no graph does, one of another
    instance of the class is looked for, because Dynamo shares a graph among instances and compiles it only once.
    """
    options, mode = _asked(fast)
    modules = modules_of(fast)
    equal = [g for g in compiled_graphs() if _same_options(g, options, mode)]
    mine = {id(t) for t in _tensors(modules)}
    parts = {id(part) for m in modules for part in m.modules()}
    executions = {g: _executions(g, modules) for g in equal}
    own = [g for g in equal if executions[g] or _alive(g) & mine or _made_of(g, parts)]
    if not mine:
        own = own or [g for g in equal if not g.owners]
    if own:
        shared = bool(mine) and not any(_alive(g) & mine or _made_of(g, parts) for g in own)
        return Found(modules, tuple(own), tuple(e for g in own for e in executions[g]), shared)
    like = [g for g in equal if g.owners and _could_be(g, modules)] if mine else []
    if like:
        return Found(modules, tuple(like), shared=True)
    raise NotCompiled(
        "nothing is compiled yet for this model and these options; call it once with real inputs, then ask again"
        + ("" if not compiled_graphs() else f" ({len(compiled_graphs())} graph(s) of other models or options exist)")
    )


def modules_of(fast: Any) -> tuple[nn.Module, ...]:
    """The modules that a compiled thing runs: the module itself, or what a function is bound to or closes over."""
    if isinstance(fast, nn.Module):
        return (getattr(fast, "_orig_mod", fast),)
    fn = getattr(fast, "_torchdynamo_orig_callable", fast)
    held: list[Any] = [getattr(fn, "__self__", None)]
    held += [c.cell_contents for c in getattr(fn, "__closure__", None) or () if _filled(c)]
    code = getattr(fn, "__code__", None)
    held += [fn.__globals__.get(n) for n in code.co_names] if code is not None else []
    found = {id(m): m for m in (getattr(h, "_orig_mod", h) for h in held) if isinstance(m, nn.Module)}
    return tuple(found.values())


def _executions(graph: CompiledGraph, modules: tuple[nn.Module, ...]) -> list[Execution]:
    """The parts of the modules that have run a graph."""
    paths = {id(t): path for m in modules for path, t in (*m.named_parameters(prefix=""), *m.named_buffers(prefix=""))}
    made = []
    for tensors in graph.models.ran_with():
        mine = {path: paths[id(t)] for path, t in tensors.items() if id(t) in paths}
        if mine:
            inside = max((_inside(path, own) for path, own in mine.items()), key=lambda found: found[1])[0]
            made.append(Execution(graph, frozenset(id(t) for t in tensors.values() if id(t) in paths), inside))
    return made


def _inside(in_graph: str, in_model: str) -> tuple[tuple[str, str], int]:
    """What differs before the common end of two paths, and how many names are common."""
    names, own = in_graph.split("."), in_model.split(".")
    common = 0
    while common < min(len(names), len(own)) and names[-1 - common] == own[-1 - common]:
        common += 1
    return (".".join(own[: len(own) - common]), ".".join(names[: len(names) - common])), common


def _made_of(graph: CompiledGraph, parts: set[int]) -> bool:
    """Whether a graph was made of a method of one of the modules; all that is known of one that reads no weights."""
    return not graph.owners and id(graph.models.module) in parts


def tensors_of(fast: Any) -> list[Tensor]:
    """Parameters and buffers of what was compiled, each once."""
    return _tensors(modules_of(fast))


def _tensors(modules: tuple[nn.Module, ...]) -> list[Tensor]:
    found = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return list(found.values())


def _asked(fast: Any) -> tuple[dict[str, Any], str | None]:
    """The options and mode that ``torch.compile`` was given; it keeps them in the compiler function that it wrapped."""
    if isinstance(fast, nn.Module) and getattr(fast, "_compiled_call_impl", None) is not None:
        fast = fast._compiled_call_impl  # Module.compile() compiles in place
    # Wrappers on the way copy attributes of what they wrap, so only the innermost one can be trusted.
    *_, asked = (None, *_callbacks(fast))
    if asked is None:
        raise NotCompiled(
            f"{type(fast).__name__} is not the result of torch.compile; "
            "give what torch.compile(model, backend='accelpass') returned"
        )
    if getattr(asked, "compiler_fn", None) is not backend:
        name = getattr(asked, "compiler_name", None) or getattr(asked, "__name__", type(asked).__name__)
        raise NotCompiled(f"this was compiled by {name!r}; compile it with backend='accelpass'")
    return asked.kwargs.get("options") or {}, asked.kwargs.get("mode")


def _callbacks(fast: Any) -> Iterator[Any]:
    """What Dynamo calls to compile, and what that wraps. The public config getter closes over the context it is in."""
    getter: Callable[..., Any] | None = getattr(fast, "get_compiler_config", None)
    for cell in getattr(getter, "__closure__", None) or ():
        callback = getattr(cell.cell_contents, "callback", None) if _filled(cell) else None
        while callback is not None:
            yield callback
            callback = getattr(callback, "_torchdynamo_orig_backend", None)


def _same_options(graph: CompiledGraph, options: dict[str, Any], mode: str | None) -> bool:
    if (graph.given or {}) != options:
        return False
    return graph.options.mode == (None if mode == "default" else mode) or "mode" in options


def _alive(graph: CompiledGraph) -> set[int]:
    return {id(t) for t in (ref() for ref in graph.owners) if t is not None}


def _could_be(graph: CompiledGraph, modules: tuple[nn.Module, ...]) -> bool:
    """Whether the modules have every parameter that the graph reads, under the same path and of the same shape."""
    own = {path: (t.shape, t.dtype) for m in modules for path, t in m.named_parameters(remove_duplicate=False)}
    return bool(graph.models.parameters) and graph.models.parameters.items() <= own.items()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a closure variable that was deleted or not assigned yet
        return False
