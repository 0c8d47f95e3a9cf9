"""The model's loss on calibration data, run from its graph so that each attention can be computed in another way."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from accelpass.api.calibration.tapped_graph import TappedGraph
from accelpass.ir import attention
from accelpass.ir.attention.spec.block_select import not_a_prompt
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.torch_private import SET_GRAD_ENABLED, recompile_limit
from accelpass.ir.transform.tap import Tap
from accelpass.passes.core.base import Attend, Changes, Seen

IGNORED = -100
"""The label of a token that does not count, as transformers and torch have it."""
MARKS = frozenset({"labels", "needle"})
"""What a batch says of its tokens to a pass; the model is not given it."""
_OBSERVED = 64
"""Queries that are kept of what comes before decoded tokens."""
_KEPT = 64
"""Logits are kept for as many last tokens as count, rounded up to this, so that few graphs serve all batches."""

_LENGTHS = 256
"""Graphs at most, one for each length of batches and of their answers."""

Batch = Mapping[str, Any]


def parted(batches: Sequence[Batch], validation: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What is learnt from and what is compared on; see :func:`accelpass.calibrate`."""
    if validation:
        return list(batches), list(validation)
    lengths = [b["input_ids"].shape[1] for b in batches]
    if len(set(lengths)) > 1:
        return (
            [b for b, n in zip(batches, lengths, strict=True) if n < max(lengths)],
            [b for b, n in zip(batches, lengths, strict=True) if n == max(lengths)],
        )
    return (list(batches[:-1]), list(batches[-1:])) if len(batches) > 1 else (list(batches), list(batches))


class LossStudy:
    """A :class:`~accelpass.passes.core.base.Study` of one model.

    Each length of a batch is captured once. Between attentions activations are recomputed for the gradient: what is kept
    is a few tensors a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        validation: Sequence[Batch],
        bar: Progress,
        name: str,
        learnt: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.model, self.batches, self.validation, self.bar, self.name = model, batches, validation, bar, name
        self.batch: Batch = {}
        self.learnt = learnt
        self._begun: dict[int, _Begun] = {}
        self._now: _Begun | None = None
        self._outputs: dict[str, tuple[Tensor, ...]] = {}
        self._projections: dict[str, dict[str, Tensor]] = {}
        self._changes: Changes = {}
        self._attend: Attend = _as_it_is
        # In one piece: what Dynamo left to Python would run without the caller's attention.
        self._graph = torch.compile(model, backend=self._backend, dynamic=False, fullgraph=True)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def gradients(self, attend: Attend, what: str) -> None:
        self._attend = attend
        for batch in self.bar.track(self.batches, description=f"{self.name}: {what}"):
            with torch.enable_grad():
                total, count = self._loss(batch, True)
                if total.requires_grad:
                    (total / count).backward()

    def observed(self, attend: Attend, what: str) -> None:
        self._attend = attend
        for batch in self.bar.track(self.batches, description=f"{self.name}: {what}"):
            with torch.no_grad():
                self._loss(batch, False)

    def trained(self, attend: Attend, changes: Changes, step: Callable[[], None], what: str) -> None:
        self._attend, self._changes = attend, changes
        try:
            for batch in self.bar.track(self.batches, description=f"{self.name}: {what}"):
                with torch.enable_grad():
                    total, count = self._loss(batch, True)
                    (total / count).backward()
                step()
        finally:
            self._changes = {}

    def projections(self, site: str) -> Mapping[str, Tensor]:
        return self._projections.get(site, {})

    def perplexity(self, attend: Attend, what: str, changes: Changes | None = None) -> float:
        self._attend, self._changes = attend, changes or {}
        try:
            return self._perplexity(what)
        finally:
            self._changes = {}

    def _perplexity(self, what: str) -> float:
        sums = []
        for batch in self.bar.track(self.validation, description=f"{self.name}: {what}"):
            with torch.no_grad():
                total, count = self._loss(batch, False)
            sums.append((float(total), count))
        return math.exp(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def losses(
        self,
        taps: Callable[[Program], Sequence[Tap]],
        vectors: Callable[[], Mapping[str, Tensor]],
        what: str,
        epochs: int = 1,
    ) -> Iterator[Tensor]:
        graph = TappedGraph(self.model, taps, vectors, f"study.{self.name}")
        try:
            for batch in self.bar.track([*self.batches] * epochs, description=f"{self.name}: {what}"):
                labels, _ = self._labels(batch)
                made = graph(**{k: v for k, v in batch.items() if k not in MARKS}, use_cache=False).logits
                with torch.enable_grad():
                    yield _cross_entropy(made[:, :-1], labels) / int((labels != IGNORED).sum())
        finally:
            graph.close()

    def last_queries(self, site: str) -> Tensor:
        assert self._now is not None
        return self._now.queries[site]

    def projected(self, site: str, out: Tensor) -> Tensor:
        if site not in self._outputs:
            raise PassError(f"{self.name}: {site or 'an attention'}: no linear reads its result")
        return F.linear(out.transpose(1, 2).flatten(2), *self._outputs[site])

    def decoded(self, attend: Attend, what: str, seen: Seen | None = None) -> float:
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise OptionError(f"{self.name}: calibration needs a model that takes position_ids; this one does not")
        batches = list({id(b): b for b in (*self.batches, *self.validation)}.values())
        self._gradients, total, count = False, 0.0, 0
        for batch in self.bar.track(batches, description=f"{self.name}: {what}"):
            self.batch = batch
            begun = self._now = self._begun.get(id(batch)) or self._begun.setdefault(id(batch), self._begin(batch))

            def to_all(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, begun: _Begun = begun) -> Tensor | None:
                before = begun.past[spec.site]
                return attend(spec, q, torch.cat([before[0], k], 2), torch.cat([before[1], v], 2))

            self._attend = to_all
            loss, made = begun.loss, [begun.first]
            if begun.ids.shape[1]:
                made.append(self._logits(begun.given()))
                loss += float(_cross_entropy(made[-1], begun.labels))
            if seen is not None:
                seen(torch.cat(made, 1))
            total, count = total + loss, count + begun.count
        return math.exp(total / count)

    def _begin(self, batch: Batch) -> _Begun:
        """Computes what comes before the tokens that count, and keeps its keys and values."""
        more = sorted(set(batch) - {"input_ids", *MARKS})
        if more:
            raise OptionError(
                f"{self.name}: calibration batches have input_ids and labels; this one also has {', '.join(more)}"
            )
        ids, (labels, begins) = batch["input_ids"], self._labels(batch)
        past: dict[str, tuple[Tensor, Tensor]] = {}
        queries: dict[str, Tensor] = {}

        def keep(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            why = not_a_prompt(spec, q, k)
            if why is not None:
                raise PassError(f"{self.name}: {spec.site}: {why}; calibrate on texts without padding")
            past[spec.site], queries[spec.site] = (k, v), q[:, :, -_OBSERVED:].clone()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True)

        self._attend = keep
        last = {"logits_to_keep": 1} if self._keeps else {}
        logits = self._logits({"input_ids": ids[:, : begins + 1], **last})
        first = logits[:, -1:]
        loss, count = float(_cross_entropy(first, labels[:, begins : begins + 1])), int((labels != IGNORED).sum())
        return _Begun(ids[:, begins + 1 : -1], labels[:, begins + 1 :], past, queries, first, loss, count)

    def _loss(self, batch: Batch, gradients: bool) -> tuple[Tensor, int]:
        """Cross entropy, summed, and of how many tokens."""
        self.batch = batch
        given = {k: v for k, v in batch.items() if k not in MARKS}
        labels, begins = self._labels(batch)
        last = labels.shape[1] - begins
        if self._keeps and last < labels.shape[1]:
            last = min(labels.shape[1], -(-last // _KEPT) * _KEPT)
            given["logits_to_keep"] = last + 1  # the last one is of a token that is not there
        self._gradients = gradients
        logits = self._logits(given)
        with torch.set_grad_enabled(gradients):
            total = _cross_entropy(logits[:, :-1][:, -last:], labels[:, -last:])
        return total, int((labels != IGNORED).sum())

    def _logits(self, given: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), recompile_limit(_LENGTHS):
            return self._graph(**given, use_cache=False).logits

    def _labels(self, batch: Batch) -> tuple[Tensor, int]:
        """The token that follows each place but the last, and the first of these places that counts."""
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        counts = (labels != IGNORED).any(0).nonzero()[:, 0]
        if not len(counts):
            raise OptionError(f"{self.name}: a batch has no label that counts; all of them are {IGNORED}")
        return labels, int(counts[0])

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = attention.captured(gm, inputs)
        for found in program.analysis(attention.detect):
            if found.o_proj is not None and found.o_proj.target is torch.ops.aten.linear.default:
                held = [program.tensors.value(n) for n in found.o_proj.args[1:] if n is not None]
                self._outputs[found.path] = tuple(t.detach() for t in held if t is not None)
            self._projections[found.path] = _projections(program, found)
        paths = [program.tensors.path(node) for node in placeholders(program.gm)]
        part = 0
        for node in [*program.graph.nodes]:
            if is_attention(node):
                node.target = self._attended
            elif node.op == "call_function" and node.target is SET_GRAD_ENABLED:
                # The model was captured without gradients, and would put that state back in the middle.
                program.graph.erase_node(node)

        def number(node: fx.Node) -> int:
            nonlocal part
            mine, part = part, part + (node.op == "call_function" and node.target == self._attended)
            return mine

        parts = split_module(program.gm, program.gm, number, keep_original_order=True)
        for name, module in [*parts.named_children()]:
            setattr(parts, name, _Recomputed(module))

        def run(*given: Any) -> Any:
            with torch.set_grad_enabled(self._gradients):
                mine = (self._changed(p, t) for p, t in zip(paths, given, strict=False))
                return parts(*mine, *map(_detached, given[len(paths) :]))

        return run

    def _changed(self, path: str | None, given: Any) -> Any:
        change = self._changes.get(path) if path is not None else None
        return _detached(given) if change is None else change(given.detach())

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], text: str) -> Tensor:
        """An attention of the graph: what the caller makes of it."""
        spec = AttentionSpec.from_json(text)
        made = self._attend(spec, q, k, v)
        return attention.attend(q, k, v, extras, spec)[0] if made is None else made


def _projections(program: Program, found: attention.Attention) -> dict[str, Tensor]:
    """Weights ``(out, in)`` of the plain linears around an attention, by path."""
    linears = [n for n in (*found.q_proj, *found.k_proj, *found.v_proj, found.o_proj) if n is not None]
    weights = [n.args[1] for n in linears if n.target is torch.ops.aten.linear.default]
    held = {program.tensors.path(w): program.tensors.value(w) for w in weights if isinstance(w, fx.Node)}
    return {path: t.detach() for path, t in held.items() if path is not None and t is not None}


@dataclass(frozen=True)
class _Begun:
    """A batch of which all that comes before the tokens that count is computed.

    Attributes:
        ids, labels: the tokens that are left, without the last, which predicts nothing, and what follows each.
        past: keys and values of each site before them; queries: the last of them.
        first: the logits that what comes before them ends with; loss: of the first label by these.
        count: of all labels.
    """

    ids: Tensor
    labels: Tensor
    past: Mapping[str, tuple[Tensor, Tensor]]
    queries: Mapping[str, Tensor]
    first: Tensor
    loss: float
    count: int

    def given(self) -> dict[str, Tensor]:
        """What the model takes."""
        begins = next(iter(self.past.values()))[0].shape[2]
        positions = torch.arange(begins, begins + self.ids.shape[1], device=self.ids.device)
        return {"input_ids": self.ids, "position_ids": positions.expand(len(self.ids), -1)}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _as_it_is(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    return None


def _detached(given: Any) -> Any:
    """Weights get no gradient of their own: it would be as large as the model, and nothing reads it."""
    return given.detach() if isinstance(given, Tensor) else given


class _Recomputed(nn.Module):
    """A part of a graph, up to an attention; where there are gradients, it is computed again for them."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: Any) -> Any:
        return checkpoint(self.part, *given, use_reentrant=False) if torch.is_grad_enabled() else self.part(*given)
