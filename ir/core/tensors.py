"""Where a graph's constant tensors come from, and how a pass adds tensors derived from them.

Dynamo shares one compiled graph among all instances of a class and does not recompile when a weight is swapped or
reloaded. A tensor computed from a weight (packed int8, concatenated rows) is therefore never baked into the graph: it
becomes one more graph input, found at every call by the identity of the weight that was passed in.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.derived import DERIVED, Entry, Recipe, SeenSources, leave_file, owns_storage
from accelpass.ir.core.graph import append_placeholder, placeholders, value, written_inputs
from accelpass.ir.core.state import Slot, StateSpec
from accelpass.ir.torch_private import FakeTensor


class TensorSource(ABC):
    """The model tensors behind a graph's nodes.

    Attributes:
        recalled: inputs that were made by :meth:`recall`, and their names.
    """

    gm: fx.GraphModule
    recalled: dict[fx.Node, str]

    @abstractmethod
    def path(self, node: fx.Node) -> str | None:
        """Parameter path (``model.layers.3.self_attn.k_proj.weight``) if the node is model state, else None."""

    @abstractmethod
    def value(self, node: fx.Node) -> Tensor | None:
        """The tensor itself at compile time; None for user inputs, computed values and derived tensors."""

    @abstractmethod
    def derive(self, nodes: Sequence[fx.Node], recipe: Recipe, names: Sequence[str]) -> list[fx.Node]:
        """Add nodes that hold ``recipe`` of ``nodes``; these may be model state or themselves derived."""

    @abstractmethod
    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The model-state nodes that ``node`` is, or is derived from; empty if it is neither, or if the graph writes to it."""

    @abstractmethod
    def state(self, anchor: fx.Node, spec: StateSpec) -> fx.Node:
        """Declare state that lives with the graph input ``anchor``; write to the returned node with an in-place ATen op."""

    def artefact(self, anchor: fx.Node, tensors: Sequence[Tensor], names: Sequence[str]) -> list[fx.Node]:
        """Add nodes that hold tensors of a plan, on the device and in the dtype of the model state ``anchor``, with which they live."""

        def made(weight: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.to(weight.dtype) for t in placed(weight, tensors))

        return self.derive([anchor], Recipe(("artefact", tuple(names), *map(digest, tensors)), made), names)

    @abstractmethod
    def callers(self) -> list[fx.Node]:
        """The inputs that a caller passes, in order."""

    def recall(self, name: str, fake: Tensor) -> fx.Node:
        """An input that is neither the caller's nor the model's: whoever runs the graph finds it under ``name``."""
        for node, known in self.recalled.items():
            if known == name:
                return node
        node = append_placeholder(self.gm, re.sub(r"\W", "_", name), fake)
        self.recalled[node] = name
        return node

    def is_state(self, node: fx.Node) -> bool:
        """True for state that a pass declared; its values change from call to call."""
        return False

    def is_constant(self, node: object) -> bool:
        """True for model state and for what is derived from it."""
        return isinstance(node, fx.Node) and bool(self.sources(node))


def placed(weight: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of a plan where a weight is: on its device, and without values where it has none."""
    if isinstance(weight, FakeTensor):
        return tuple(weight.new_empty(t.shape, dtype=t.dtype) for t in tensors)
    return tuple(t.to(weight.device) for t in tensors)


def digest(tensor: Tensor) -> str:
    """What tells a tensor's values from others."""
    return hashlib.sha1(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()


def called(recipe: Recipe, paths: Sequence[str]) -> str:
    """The path of what a recipe makes of tensors with these paths."""
    return "+".join(dict.fromkeys(paths[:1] if recipe.first else paths))


@dataclass(frozen=True)
class _Group:
    """One derivation: the positions of its sources among the graph's inputs, and its recipe."""

    positions: tuple[int, ...]
    recipe: Recipe


class FromInputs(TensorSource):
    """torch.compile: model tensors are graph inputs. Derived tensors become further inputs, looked up at each call."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], paths: dict[fx.Node, tuple[str, str]]):
        self.gm = gm
        self._written = written_inputs(gm.graph)
        self.inputs = list(example_inputs)
        self.paths = paths
        self._position = {n: i for i, n in enumerate(placeholders(gm))}
        self._derived: dict[fx.Node, tuple[_Group, int]] = {}
        self._called: dict[fx.Node, str] = {}
        self.recalled = {}

    def path(self, node: fx.Node) -> str | None:
        found = self.paths.get(node)
        return found[0] if found else self._called.get(node)

    def _named(self, node: fx.Node) -> str:
        """The path of model state; of a user's input, which anchors state, its name."""
        return self.paths[node][0] if node in self.paths else node.name

    def kind(self, node: fx.Node) -> str | None:
        """``param``, ``buffer`` or ``constant``; None if the node is not model state."""
        return self.paths[node][1] if node in self.paths else None

    def value(self, node: fx.Node) -> Tensor | None:
        return self.inputs[self._position[node]] if node in self.paths else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self._derived:
            nodes = list(self._position)
            return [nodes[p] for p in self._derived[node][0].positions]
        return [node] if node in self.paths and node not in self._written else []

    def derive(self, nodes: Sequence[fx.Node], recipe: Recipe, names: Sequence[str]) -> list[fx.Node]:
        group = self._composed(nodes, recipe)
        for other, _ in list(self._derived.values()):
            if other == group:  # the same derivation twice is one set of inputs
                return [n for n, (g, _) in self._derived.items() if g == group]
        # Only shapes are needed here. The tensors are made once all passes have run, so that a derivation which a
        # later pass derives further from is never computed on its own.
        fakes = [value(n) for n in nodes]
        with fakes[0].fake_mode, torch.no_grad():
            shapes = recipe.fn(*fakes)
        made = []
        for index, (name, fake) in enumerate(zip(names, shapes, strict=True)):
            node = append_placeholder(self.gm, name, fake)
            self._derived[node] = (group, index)
            self._called[node] = called(recipe, [self.path(n) or n.name for n in nodes])
            made.append(node)
        return made

    def state(self, anchor: fx.Node, spec: StateSpec) -> fx.Node:
        """Declare state that lives with the graph input ``anchor``; the same declaration in another graph shares it.

        Write to the returned node with an in-place ATen op; AOTAutograd and Inductor see a mutated model buffer.
        """
        (node,) = self.derive([anchor], Recipe.of_state(spec), [spec.name.replace(".", "_")])
        return node

    def origin(self, node: fx.Node) -> tuple[str, Any]:
        """Where an input's value comes from: ``("argument", position)``, ``("recalled", name)`` or ``("derived", (what, which))``."""
        if node in self._derived:
            return "derived", self._derived[node]
        if node in self.recalled:
            return "recalled", self.recalled[node]
        return "argument", self._position[node]

    def is_state(self, node: fx.Node) -> bool:
        return node in self._derived and self._derived[node][0].recipe.state is not None

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of a call, and the derived tensors, for every placeholder that the graph has now."""
        out = []
        for node in placeholders(self.gm):
            if node in self._derived:
                group, output = self._derived[node]
                entry = DERIVED.get([args[p] for p in group.positions], group.recipe, self.path(node) or "")
                out.append(entry.tensors[output])
            else:
                out.append(args[self._position[node]])
        return out

    def _composed(self, nodes: Sequence[fx.Node], recipe: Recipe) -> _Group:
        """The derivation from model tensors alone: sources that are derived themselves are looked through."""
        positions: list[int] = []
        starts: dict[_Group | int, int] = {}
        parts: list[tuple[Recipe | None, int, int, int]] = []  # inner recipe, its output, span of its sources
        for node in nodes:
            derived = self._derived.get(node)
            inner, output = derived if derived else (None, 0)
            mine = inner.positions if inner else (self._position[node],)
            start = starts.setdefault(inner or self._position[node], len(positions))
            if start == len(positions):
                positions += mine
            parts.append((inner.recipe if inner else None, output, start, start + len(mine)))
        return _Group(tuple(positions), recipe.after(parts))

    @property
    def inputs_nodes(self) -> list[fx.Node]:
        """The graph's original inputs, in order."""
        return list(self._position)

    def callers(self) -> list[fx.Node]:
        return [n for n in self._position if n not in self.paths]

    def position(self, node: fx.Node) -> int:
        """Where an original input stands among a call's arguments."""
        return self._position[node]

    def model(self, site: str = "") -> int | None:
        """The position of one of the model's own tensors, which tells instances apart; None if there is none.

        Where a module is given, it is one of that module's, if there is one: the same in all graphs that hold the module, however
        much of the model they hold.
        """
        own = [n for n, (path, _) in self.paths.items() if path.startswith(f"{site}.")]
        return min((self._position[n] for n in own or self.paths), default=None)

    def binder(self, release: bool = False) -> Binder:
        """Drop unused inputs from the graph and return what maps a call's arguments to the graph's new inputs."""
        kept: list[int] = []
        derived: list[tuple[_Group, int]] = []
        for node in placeholders(self.gm):
            if not node.users:
                self.gm.graph.erase_node(node)
            elif node in self._derived:
                derived.append(self._derived[node])
            elif node not in self.recalled:
                kept.append(self._position[node])
        used = {p for group, _ in derived for p in group.positions}
        unused = used.difference(kept).intersection(self._position[n] for n in self.paths)
        paths = {p: self._named(n) for n, p in self._position.items() if p in used}
        if not release:
            return Binder(tuple(kept), tuple(derived), paths)
        own = [self._position[n] for n in self.paths if self._position[n] in kept and self._position[n] not in used]
        return Binder(tuple(kept), tuple(derived), paths, frozenset(unused), tuple(own))


class Binder:
    """Maps the arguments of a call to those of the rewritten graph: the kept ones, then the derived tensors."""

    def __init__(
        self,
        kept: tuple[int, ...],
        derived: tuple[tuple[_Group, int], ...],
        paths: dict[int, str],
        replaced: frozenset[int] = frozenset(),
        staying: tuple[int, ...] = (),
    ):
        self.kept = kept
        self.groups = list(dict.fromkeys(group for group, _ in derived))
        self._outputs = [(self.groups.index(group), output) for group, output in derived]
        self.paths = paths
        self.released = replaced
        """Positions of inputs that only derived tensors need and whose memory is given back once those exist."""
        self.staying = staying
        """Positions of the model's other tensors; any of them would keep a mapped file in memory."""
        self._sources = [p for group in self.groups for p in group.positions]
        self._last: SeenSources | None = None
        self.thorough = True
        """Whether a call takes long enough for values of all weights to be compared; see :class:`.derived.SeenSources`."""

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        last = self._last
        entries = None if last is None else last.served([args[p] for p in self._sources], self.thorough)
        if entries is None:
            restamped = DERIVED.restamped
            entries = self._asked(args)
            self._last = SeenSources(entries, restamped)
        return [args[p] for p in self.kept] + [entries[group].tensors[output] for group, output in self._outputs]

    def _asked(self, args: Sequence[Any]) -> list[Entry | Slot]:
        """The entry of each group, derived now if it is missing or a source has changed."""
        made, missed = list[Entry | Slot](), False
        for group, entry in zip(self.groups, self._known(), strict=True):
            sources = [args[p] for p in group.positions]
            if entry is None or not entry.serves(sources):
                entry = DERIVED.get(sources, group.recipe, self.paths[group.positions[0]])
                missed = True
            made.append(entry)
        if missed and self.released:
            DERIVED.release([args[p] for p in self.released if owns_storage(args[p])])
            leave_file([args[p] for p in self.staying])
        return made

    def _known(self) -> list[Entry | Slot | None]:
        """The entry of each group at the last call; None where there is none, or none any more."""
        return [None] * len(self.groups) if self._last is None else self._last.entries

    def tensors(self) -> list[Tensor]:
        """The derived tensors that the last call used; each once."""
        return list({id(t): t for entry in self._known() if entry is not None for t in entry.tensors}.values())

    def derived_bytes(self) -> int:
        """Bytes of :meth:`tensors`."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class FromModule(TensorSource):
    """torch.export: model tensors are ``get_attr`` nodes. Derived tensors become buffers of the graph module."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self._written = written_inputs(gm.graph)
        self._derived: dict[fx.Node, list[fx.Node]] = {}
        self._called: dict[fx.Node, str] = {}
        self.recalled = {}
        self.states: dict[fx.Node, tuple[fx.Node, StateSpec]] = {}
        """Declared state: its node, the input that it lives with, and what was declared."""

    def path(self, node: fx.Node) -> str | None:
        if node in self._called:
            return self._called[node]
        if node in self.states:
            return None
        return str(node.target) if isinstance(self._attribute(node), Tensor) else None

    def value(self, node: fx.Node) -> Tensor | None:
        return None if node in self._derived or node in self.states else self._attribute(node)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self._derived:
            return self._derived[node]
        if node in self.states:
            return []
        return [node] if self._attribute(node) is not None and node not in self._written else []

    def derive(self, nodes: Sequence[fx.Node], recipe: Recipe, names: Sequence[str]) -> list[fx.Node]:
        values = [self._attribute(n) for n in nodes]
        assert all(v is not None for v in values)
        tensors = DERIVED.get([v for v in values if v is not None], recipe, self.path(nodes[0]) or "").tensors
        made = []
        for name, tensor in zip(names, tensors, strict=True):
            attribute = name
            while hasattr(self.gm, attribute):
                attribute += "_"
            self.gm.register_buffer(attribute, tensor)
            last = max(nodes)
            with self.gm.graph.inserting_after(last):
                node = self.gm.graph.get_attr(attribute)
            fake = nodes[0].meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
            node.meta["val"] = fake
            self._derived[node] = [s for n in nodes for s in self.sources(n)]
            self._called[node] = called(recipe, [self.path(n) or n.name for n in nodes])
            made.append(node)
        return made

    def state(self, anchor: fx.Node, spec: StateSpec) -> fx.Node:
        """A buffer as it starts, for as many sequences as the anchor was traced with."""
        for node, known in self.states.items():
            if known == (anchor, spec):
                return node
        fake = value(anchor)
        start = spec.start(torch.empty(fake.shape, dtype=fake.dtype, device=fake.device))
        name = re.sub(r"\W", "_", f"{anchor.name}.{spec.name}")
        self.gm.register_buffer(name, start)
        with self.gm.graph.inserting_after(placeholders(self.gm)[-1]):
            node = self.gm.graph.get_attr(name)
        node.meta["val"] = fake.fake_mode.from_tensor(start, static_shapes=True)
        self.states[node] = (anchor, spec)
        return node

    def is_state(self, node: fx.Node) -> bool:
        return node in self.states

    def callers(self) -> list[fx.Node]:
        return [n for n in placeholders(self.gm) if n not in self.recalled]

    def _attribute(self, node: object) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":  # operands of a packed linear are a list
            return None
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, Tensor) else None
