"""The torch.compile entry, lowering, Triton kernels, the eager reference, and what leaves torch: ONNX files and packages.

Names are listed in ``__init__.pyi`` and imported when they are asked for: a program that opens a package needs no compiler.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
