"""The intermediate representation: capture, canonical form, semantic ops, analyses, verification.

Everything here depends on torch alone. A :class:`~accelpass.ir.program.Program` is what a pass receives: a graph in
pre-dispatch ATen, the paths of the model's own tensors, and a way to add tensors derived from them.
"""

from accelpass.ir.errors import AccelpassError, GraphError, SpecConflict
from accelpass.ir.program import Program

__all__ = ["AccelpassError", "GraphError", "Program", "SpecConflict"]
