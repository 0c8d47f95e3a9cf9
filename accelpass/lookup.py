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
class Found:
    """A compiled model and its graphs.

    Attributes:
        modules: the modules behind it: one for a compiled module; what a compiled function closes over.
        graphs: oldest first.
        shared: the graphs were compiled for another instance of the class, which Dynamo shares.
    """

    modules: tuple[nn.Module, ...]
    graphs: tuple[CompiledGraph, ...]
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
    own = [g for g in equal if _alive(g) & mine]
    if not mine:
        own = [g for g in equal if not g.owners]
    if own:
        return Found(modules, tuple(own))
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


def reads(graph: CompiledGraph, found: Found) -> frozenset[object]:
    """What identifies the part of the model that a graph reads, so that recompilations of one part are equal.

    Tensors of the model by identity, without caches, which may be others at each call; by path if the graph was
    compiled for another instance.
    """
    if found.shared:
        return frozenset(graph.binder.paths.values() if graph.binder else ())
    own = {id(t) for t in _tensors(found.modules)}
    alive = (t for t in (ref() for ref in graph.owners) if t is not None)
    return frozenset(id(t) for t in alive if (id(t) in own if own else isinstance(t, nn.Parameter)))


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
    return bool(graph.parameters) and graph.parameters.items() <= own.items()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a closure variable that was deleted or not assigned yet
        return False
