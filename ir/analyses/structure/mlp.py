"""Every MLP: a linear, a non-linear function of each of its outputs (perhaps times a gate), a linear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import (
    CASTS,
    SPLITS,
    VIEWS,
    bare,
    between,
    common_path,
    fixed,
    is_part,
    is_pointwise,
    positions,
    tensors,
)
from accelpass.ir.analyses.structure import activation
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.analyses.structure.norm import Norm, norms
from accelpass.ir.analyses.structure.output_head import output_heads
from accelpass.ir.core.graph import aten, is_call, value
from accelpass.ir.core.program import Program

_MOST = 64  # nodes between the linears; a hand-written GELU with a gate has about 20
_LOW_RANK = ("tanh", "sigmoid")  # alone between two linears: a pooler or a low-rank gate, not an MLP


@dataclass(frozen=True)
class Mlp:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))``.

    Attributes:
        kind: ``mlp`` or ``gated_mlp``.
        x: what ``up`` (and ``gate``) read.
        node: the output, which is ``down``'s.
        up, down: linear sites.
        gate: the one that the activation is applied to; the same as ``up`` where one linear makes both halves; None
            without a gate.
        activation: ``gelu``, ``gelu_tanh``, ``quick_gelu``, ``silu``, ``relu``, ``relu2``, ...; ``other`` if it has no
            common name.
        path: the module that holds the linears.
    """

    kind: str
    x: fx.Node
    node: fx.Node
    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    path: str

    @property
    def fused(self) -> bool:
        """One linear makes the gate and what it gates."""
        return self.gate is not None and self.gate.node is self.up.node


@dataclass
class _Hidden:
    """What lies between ``down`` and the linears behind it. A leaf is a linear's output, or one half of it.

    ``normed`` is inside of norms, which models may put before ``down``.
    """

    nodes: set[fx.Node]
    leaves: dict[fx.Node, Linear]
    normed: set[fx.Node]


def mlps(program: Program) -> list[Mlp]:
    """All MLPs in graph order; those inside a mixture of experts' stack or loop belong to it and are not listed."""
    sites = {site.node: site for site in program.analysis(linears)}
    inner = {norm.node: norm for norm in program.analysis(norms)}
    heads = {head.linear.node for head in program.analysis(output_heads)}
    found = []
    for down in sites.values():
        if down.kind != "expert" and down.node not in heads:
            mlp = _mlp(program, down, sites, inner)
            if mlp is not None:
                found.append(mlp)
    return found


def _mlp(program: Program, down: Linear, sites: dict[fx.Node, Linear], inner: dict[fx.Node, Norm]) -> Mlp | None:
    start = down.operand()
    hidden = _hidden(program, start, sites, inner)
    if hidden is None or any(site.kind in ("expert", "patch_conv") for site in hidden.leaves.values()):
        return None
    if not _is_private(hidden, down.node):
        return None
    place = program.analysis(positions)
    glu = next((n for n in hidden.nodes if is_call(n, aten.glu)), None)
    if len(hidden.leaves) == 1:
        (site,) = hidden.leaves.values()
        act = activation.name(sorted(hidden.nodes, key=place.__getitem__))
        if act is None or (glu is None and act in _LOW_RANK):
            return None
        gate, up = (site if glu is not None else None), site
    elif len(hidden.leaves) == 2:
        sides = _gated(program, hidden, sites, inner)
        if sides is None:
            return None
        gate, up, act = sides
    else:
        return None
    if gate is not None and bare(gate.operand(), *VIEWS) is not bare(up.operand(), *VIEWS):
        return None
    linear_paths = {site.path for site in (up, gate, down) if site is not None}
    return Mlp(
        kind="mlp" if gate is None else "gated_mlp",
        x=up.operand(),
        node=down.node,
        up=up,
        gate=gate,
        down=down,
        activation=act,
        path=common_path(p.rpartition(".")[0] for p in linear_paths),
    )


def _hidden(
    program: Program, start: fx.Node, sites: dict[fx.Node, Linear], inner: dict[fx.Node, Norm]
) -> _Hidden | None:
    """Walk back from ``start`` to linears; None if anything but views and element-wise operations is on the way."""
    found = _Hidden(set(), {}, set())
    front = [start]
    while front:
        node = front.pop()
        if node in found.nodes or node in found.leaves or fixed(program, node):
            continue
        if node in sites:
            found.leaves[node] = sites[node]
        elif is_part(node):
            whole = bare(node.args[0].args[0] if not is_call(node, aten.slice) else node.args[0], *VIEWS)
            behind = _biased(program, whole, sites)
            if behind is None:
                return None
            found.leaves[node] = behind
        elif node in inner:
            found.nodes.add(node)
            found.normed.update(between(program, inner[node].x, node))
            front.append(inner[node].x)
        elif is_pointwise(node) or is_call(node, *CASTS, *VIEWS, aten.glu):
            found.nodes.add(node)
            front += tensors(node)
        else:
            return None
        if len(found.nodes) > _MOST:
            return None
    return found


def _biased(program: Program, node: fx.Node, sites: dict[fx.Node, Linear]) -> Linear | None:
    """The linear that makes ``node``, perhaps with its bias added apart."""
    if node not in sites and is_call(node, aten.add, aten.add_) and fixed(program, node.args[1]):
        node = bare(node.args[0], *VIEWS)
    return sites.get(node)


def _is_private(hidden: _Hidden, down: fx.Node) -> bool:
    """Nothing outside reads what is between the linears."""
    inside = {*hidden.nodes, *hidden.normed, *hidden.leaves, down}
    front = [*hidden.nodes, *hidden.leaves, *(site.node for site in hidden.leaves.values())]
    seen = set(front)
    while front:
        for user in front.pop().users:
            if user in inside or (not isinstance(value(user), Tensor | tuple | list) and user.op != "output"):
                continue  # a size that is asked for is no reader
            if not is_call(user, *VIEWS, *CASTS, *SPLITS, aten.add, aten.add_):
                return False
            if user not in seen:
                seen.add(user)
                front.append(user)
    return True


def _gated(
    program: Program, hidden: _Hidden, sites: dict[fx.Node, Linear], inner: dict[fx.Node, Norm]
) -> tuple[Linear, Linear, str] | None:
    """(gate, up, activation) if the leaves meet in a product, one of them activated."""
    place = program.analysis(positions)
    for node in sorted(hidden.nodes, key=place.__getitem__, reverse=True):
        if not is_call(node, aten.mul, aten.mul_):
            continue
        sides = [_hidden(program, a, sites, inner) for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(sides) != 2 or any(side is None or len(side.leaves) != 1 for side in sides):
            continue
        a, b = (side for side in sides if side is not None)
        if set(a.leaves) == set(b.leaves):
            continue
        acts = [activation.name(sorted(side.nodes, key=place.__getitem__)) for side in (a, b)]
        # Both may be clamped; the gate is then the side with a named function.
        named = [act is not None and act != "other" for act in acts]
        if acts == [None, None]:
            return None
        first = named[0] or (not named[1] and acts[0] is not None)
        gate, up = (a, b) if first else (b, a)
        return next(iter(gate.leaves.values())), next(iter(up.leaves.values())), str(acts[0 if first else 1])
    return None
