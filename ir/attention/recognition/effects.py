"""Which tensors share memory, and who writes to them: what makes moving a read across other nodes unsafe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx

from accelpass.ir.core.graph import is_call, mutates, root


def writes(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose values a call changes; ``detach_`` is declared to write, and changes no value."""
    return [] if is_call(node, torch.ops.aten.detach_) else mutates(node)


class Effects:
    """Positions and writes of a graph; make a new one after changing the graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        """By root: (the writing call, the argument it writes to), in order."""
        self.roots: dict[fx.Node, fx.Node] = {}
        for position, node in enumerate(graph.nodes):
            self.position[node] = position
            self.roots[node] = root(node)
            for written in writes(node):
                self.writes[root(written)].append((node, written))

    def last_write(self, node: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The last write that ``before`` sees when it reads ``node``, made after ``node`` itself."""
        first, last = self.position[node], self.position[before]
        found = [w for w in self.writes.get(self.roots[node], ()) if first < self.position[w[0]] < last]
        return found[-1] if found else None

    def hazard(self, region: set[fx.Node], inputs: Iterable[fx.Node], out: fx.Node) -> str | None:
        """Why reading ``inputs`` at ``out`` instead of in ``region`` could see another value; None if it cannot."""
        if not region:
            return None
        last = self.position[out]
        roots = {self.roots[n]: n for n in inputs}
        first: dict[fx.Node, int] = {}
        for node in sorted(region):
            # A write before the region's first read is what the region reads; only a later one would be moved across.
            for read in (node, *node.all_input_nodes):
                first.setdefault(self.roots[read], self.position[node])
        for base, start in first.items():
            for writer, _ in self.writes.get(base, ()):
                if writer in region:
                    if base in roots or base not in region:
                        return f"{writer.name} writes to {base.name}, which is not this attention's own"
                elif start < self.position[writer] <= last:
                    if base in roots:
                        return f"{writer.name} writes to {roots[base].name} while the attention is computed"
                    return f"{writer.name} writes to {base.name}, which is inside the attention"
        return None
