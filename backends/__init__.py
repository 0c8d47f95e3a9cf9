"""The torch.compile entry, lowering, Triton kernels and the eager reference."""

from accelpass.backends.compile.compiler import CompiledGraph, backend, compiled_graphs, graphs_of

__all__ = ["CompiledGraph", "backend", "compiled_graphs", "graphs_of"]
