from .compile.compiler import CompiledGraph as CompiledGraph
from .compile.compiler import backend as backend
from .compile.compiler import compiled_graphs as compiled_graphs
from .compile.compiler import graphs_of as graphs_of

__all__: list[str]
