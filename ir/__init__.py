"""The intermediate representation: capture, canonical form, semantic ops, analyses, verification.

Everything here depends on torch alone. A :class:`~accelpass.ir.core.program.Program` is what a pass receives: a graph in
pre-dispatch ATen, the paths of the model's own tensors, and a way to add tensors derived from them.
"""

from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError, GraphError, SpecConflict

__all__ = ["AccelpassError", "GraphError", "Program", "SpecConflict"]
