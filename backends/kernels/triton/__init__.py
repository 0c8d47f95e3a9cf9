"""Triton kernels, and the torch ops made of them. Importing this package does not import Triton.

Importing `accelpass.backends.kernels.triton.weight_only_ops` registers the ops; it raises ImportError, naming the extra to
install, where Triton is missing.
"""

from types import ModuleType


def require_triton() -> ModuleType:
    """The `triton` module.

    Raises:
        ImportError: Triton is not installed; the message names the extra that brings it.
    """
    try:
        import triton
        import triton.language  # a package called triton without a language is some other package
    except ImportError as error:
        raise ImportError(
            f"accelpass needs Triton for this op ({error}); install it with: pip install 'accelpass[triton]'"
        ) from error
    module: ModuleType = triton
    return module
