"""Inductor, called in ways that torch does not promise to keep; each has a test that fails when it changes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

_LOAD = re.compile(r"(at::vec::Vectorized<u?int8_t>)::loadu\((.+), static_cast<int64_t>\(8\)\)")
_lock, _users = threading.Lock(), 0


class NoCompiler(Exception):
    """Inductor has found no C++ compiler; says what it tried."""


def inductor_modes() -> list[str]:
    """The modes that torch.compile takes."""
    import torch._inductor

    return list(torch._inductor.list_mode_options())


def contracts_by_name() -> str | None:
    """The setting of Inductor that says how products and sums are rounded as one; None where this torch has a switch or nothing."""
    from torch._inductor import config

    name = "enable_floating_point_contract_flag"
    return f"cpp.{name}" if isinstance(getattr(config.cpp, name, None), str) else None


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor's code for a graph.

    Args:
        inputs: real inputs, or fake ones.
        mode: one of :func:`inductor_modes`.
        settings: names and values of ``torch._inductor.config`` that differ for this graph.

    Raises:
        NoCompiler: there is no C++ compiler that works; any other error is Inductor's own.
    """
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    config = {**(torch._inductor.list_mode_options(mode) if mode else {}), **settings}
    try:
        with direct_byte_loads():
            compiled: Any = compile_fx(gm, list(inputs), config_patches=config or None)
    except InductorError as failure:
        if isinstance(failure.inner_exception, InvalidCxxCompiler):
            raise NoCompiler(str(failure.inner_exception)) from failure
        raise
    return compiled


def compile_ahead(exported: torch.export.ExportedProgram, settings: Mapping[str, Any]) -> list[str]:
    """AOTInductor's files for an exported program: a library, its source, and what its loader reads; constants are not in it.

    Raises:
        NoCompiler: there is no C++ compiler that works; any other error is Inductor's own.
    """
    import torch._inductor
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    args, kwargs = exported.example_inputs or ((), {})
    config = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False, **settings}
    try:
        with direct_byte_loads():
            made: Any = torch._inductor.aot_compile(exported.module(check_guards=False), args, kwargs, options=config)
    except InductorError as failure:
        if isinstance(failure.inner_exception, InvalidCxxCompiler):
            raise NoCompiler(str(failure.inner_exception)) from failure
        raise
    except InvalidCxxCompiler as failure:
        raise NoCompiler(str(failure)) from failure
    return [file for file in made if isinstance(file, str) and file]


@contextmanager
def direct_byte_loads() -> Iterator[None]:
    """Code that Inductor generates inside reads eight bytes with one instruction where vectors are those of AVX2.

    torch's ``Vectorized<int8_t>::loadu(p, 8)`` copies them to a buffer of 32 there (with AVX512 it does not), and reading that
    back waits for the copy: a matrix of bytes times a vector takes eleven times as long (1.4 in place of 15 GB/s, AMD Zen 4
    without AVX512).
    """
    global _users
    from torch._inductor.codegen.cpp import CppVecKernel

    with _lock:
        if _users == 0:
            _replaced.append(CppVecKernel._get_vec_load_line)
            CppVecKernel._get_vec_load_line = _direct  # type: ignore[method-assign]
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                CppVecKernel._get_vec_load_line = _replaced.pop()  # type: ignore[method-assign]


_replaced: list[Callable[..., str]] = []


def _direct(*args: Any, **kwargs: Any) -> str:
    """Inductor's line of C++ that loads a vector, or one that does the same at once."""
    from torch._inductor.cpu_vec_isa import VecAVX2, pick_vec_isa

    line = _replaced[-1](*args, **kwargs)
    found = _LOAD.fullmatch(line)
    if found is None or not isinstance(pick_vec_isa(), VecAVX2):
        return line
    kind, place = found.groups()
    return f"{kind}(_mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>({place}))))"
