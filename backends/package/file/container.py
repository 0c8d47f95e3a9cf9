"""A library called through its C interface, so that Python runs on while a graph does: torch's own binding holds the lock."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from torch import Tensor

from accelpass.backends.package.errors import PackageError
from accelpass.ir.torch_private import handles_of, tensors_of

_CONSTANTS = "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs"


class _Entry(ctypes.Structure):
    """``AOTInductorConstantMapEntry`` of torch's ``aoti_runtime/interface.h``."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


class Container:
    """A loaded library, with as many copies of its model's own memory as calls may run at once.

    Args:
        path: of the library; the file may go once this has returned.
    """

    def __init__(self, path: str, runners: int) -> None:
        self._library = ctypes.CDLL(path)
        self._handle, count = ctypes.c_void_p(), ctypes.c_size_t()
        name = "AOTInductorModelContainerCreateWithDevice"
        self._call(name, ctypes.byref(self._handle), ctypes.c_size_t(runners), b"cpu", None)
        self._call("AOTInductorModelContainerGetNumOutputs", self._handle, ctypes.byref(count))
        self._outputs = count.value

    @property
    def takes_constants(self) -> bool:
        """Whether this torch's libraries take constants in a form that Python can write."""
        return hasattr(self._library, _CONSTANTS)

    def set_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Let the library read these tensors where they are, by its own names; they stay as long as the process."""
        handles, held = handles_of(list(constants.values()))
        entries = (_Entry * len(handles))(*(_Entry(n.encode(), h) for n, h in zip(constants, handles, strict=True)))
        try:
            self._call(
                _CONSTANTS,
                self._handle,
                entries,
                ctypes.c_size_t(len(handles)),
                ctypes.c_bool(False),
                ctypes.c_bool(True),
            )
        finally:
            tensors_of(handles, held)  # the library has made its own

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs; other threads run Python meanwhile."""
        handles, _ = handles_of(inputs)
        given, made = (ctypes.c_void_p * len(handles))(*handles), (ctypes.c_void_p * self._outputs)()
        size = ctypes.c_size_t
        self._call(
            "AOTInductorModelContainerRun",
            self._handle,
            given,
            size(len(handles)),
            made,
            size(self._outputs),
            None,
            None,
        )
        return tensors_of([int(handle) for handle in made if handle is not None])

    def _call(self, name: str, *args: object) -> None:
        if getattr(self._library, name)(*args):
            said = ctypes.c_char_p()
            if hasattr(self._library, "AOTInductorGetLastError"):
                self._library.AOTInductorGetLastError(ctypes.byref(said))
            raise PackageError(f"{name} failed: {(said.value or b'no reason is told').decode(errors='replace')}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.AOTInductorModelContainerDelete(self._handle)
