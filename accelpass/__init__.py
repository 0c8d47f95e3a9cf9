"""Acceleration passes from the literature for any PyTorch model, through ``torch.compile``.

Importing this package imports neither torch nor transformers: torch loads every backend it knows when one is asked
for by name, and a program that only compiles with Inductor should not pay for us.

What it offers is listed in ``__init__.pyi``, which type checkers read and from which names are imported when they are asked for.
"""

from typing import Any

import lazy_loader

_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:  # in the words of Python, which programs look for
        raise AttributeError(f"module 'accelpass' has no attribute {name!r}")
    return _imported(name)
