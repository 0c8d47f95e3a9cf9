"""Attention between clusters of queries and clusters of keys that are alike, as blocks (Sparse VideoGen 2, arXiv 2505.18875)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, KERNELS
from accelpass.ir.attention.recognition.detect import Attention
from accelpass.ir.attention.spec.block_select import Blocks, changed_scores, places_of
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.graph import known, value

_STILL = 1e-4
"""Centroids that all move less than this are final (the authors' code)."""
_ROWS = 1 << 14
"""Tokens whose distances to all centroids are held at once."""


@torch.library.custom_op("accelpass::clusters", mutates_args=())
def clusters(x: Tensor, centroids: Tensor | None, count: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of each of several sets of tokens. Labels are those before the last update of the centroids, as in the authors' code.

    An op of its own: in a graph its iterations would be written out one after the other.

    Args:
        x: ``(sets, tokens, d)``.
        centroids: those to begin with, float32 ``(sets, count, d)``; None for tokens drawn with replacement, by ``seed``.
        iterations: at most; 1 or more. On a CPU it ends when no centroid moves; elsewhere they stay where they are.

    Returns:
        The cluster of each token, int64 ``(sets, tokens)``, and centroids, float32 ``(sets, count, d)``. One without tokens stays
        where it was.
    """
    points = x.float()
    if centroids is None:
        draw = torch.Generator().manual_seed(seed)
        at = torch.randint(x.shape[1], (x.shape[0], count), generator=draw).to(x.device)
        now = points.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    else:
        now = centroids.clone()
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    still = torch.zeros((), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        labels = torch.where(still, labels, _nearest(points, now))
        sums = torch.zeros_like(now).scatter_add(1, labels.unsqueeze(-1).expand(points.shape), points)
        sizes = _sizes(labels, count).unsqueeze(-1)
        moved = torch.where(still | (sizes == 0), now, sums / sizes.clamp_min(1))
        still = still | ((moved - now).norm(dim=-1).amax() < _STILL)
        now = moved
        if x.device.type == "cpu" and bool(still):
            break
    return labels, now


@clusters.register_fake
def _(x: Tensor, centroids: Tensor | None, count: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    made = x.new_empty((x.shape[0], count, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape[:2], dtype=torch.int64), made


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    found = []
    for own, among in zip(points, centroids, strict=True):
        far = among.square().sum(-1)
        found.append(torch.cat([torch.addmm(far, x, among.T, alpha=-2).argmin(-1) for x in own.split(_ROWS)]))
    return torch.stack(found)


def _sizes(labels: Tensor, count: int) -> Tensor:
    """Tokens of each cluster, int64 ``(sets, count)``."""
    found = torch.zeros(len(labels), count, dtype=torch.int64, device=labels.device)
    return found.scatter_add(1, labels, torch.ones_like(labels))


class Layout(NamedTuple):
    """Tokens of clusters in blocks of their own, the last of a cluster filled up.

    Attributes:
        order: the token at each place, int64 ``(sets, places)``; -1 for none. There are as many places as any clusters need.
        owner: the cluster of each block, int64 ``(sets, blocks)``; as many as there are clusters for a block that holds nothing.
        sizes: tokens of each cluster, int64 ``(sets, clusters)``.
    """

    order: Tensor
    owner: Tensor
    sizes: Tensor

    @staticmethod
    def of(labels: Tensor, count: int, size: int) -> Layout:
        """The layout of labelled tokens, in blocks of ``size``."""
        sets, tokens = labels.shape
        # As many as any clusters need; of a number of tokens that is not known, as if there were more of them than clusters.
        filled = min(count, max(1, tokens)) if isinstance(tokens, int) else count
        blocks = (tokens + filled * (size - 1)) // size
        sizes = _sizes(labels, count)
        ends = ((sizes + (size - 1)) // size).cumsum(-1)
        # By falling negatives: clusters ascend, and tokens of one keep their order.
        order = labels.neg().sort(dim=-1, descending=True, stable=True).indices
        cluster = labels.gather(1, order)
        before = (sizes.cumsum(-1) - sizes).gather(1, cluster)
        start = (ends - (sizes + (size - 1)) // size).gather(1, cluster) * size
        place = start + torch.arange(tokens, device=labels.device) - before
        held = torch.full((sets, blocks * size), -1, dtype=torch.int64, device=labels.device).scatter(1, place, order)
        at = torch.arange(blocks, device=labels.device).expand(sets, -1).contiguous()
        return Layout(held, torch.searchsorted(ends, at, right=True), sizes)

    def repeated(self, times: int) -> Layout:
        """The same for each of the query heads of a group."""
        return self if times == 1 else Layout(*(t.repeat_interleave(times, 0) for t in self))


@dataclass(frozen=True)
class ClusteredAttention:
    """Each cluster of queries reads the clusters of keys that its centroid pays most, up to ``top_p`` of its estimated softmax.

    Attributes:
        queries, keys: how many clusters.
        top_p: 1 reads all.
        least: share of the clusters of keys that are read whatever they are paid.
        block: tokens of a block; clusters are filled up to whole ones.
        text: tokens of text in front of those that are clustered, or behind them if below 0: they read all, and all read them.
    """

    queries: int
    keys: int
    top_p: float
    least: float
    block: int
    seed: int = 0
    text: int = 0

    def centroids(
        self, q: Tensor, k: Tensor, before: tuple[Tensor, Tensor] | None, iterations: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Labels and centroids of queries and of keys ``(batch, heads, tokens, d)``; a set for each sequence and head.

        Text has one label more than there are clusters, and no centroid.
        """
        made, (front, behind) = [], (max(self.text, 0), max(-self.text, 0))
        for number, (x, count) in enumerate(((q, self.queries), (k, self.keys))):
            shown = x[:, :, front : x.shape[2] - behind]
            flat = shown.reshape(-1, shown.shape[2], x.shape[3])
            begun = None if before is None else before[number]
            labels, now = torch.ops.accelpass.clusters(flat, begun, count, iterations, self.seed + number)
            made.append((torch.nn.functional.pad(labels, (front, behind), value=count), now))
        return made[0], made[1]

    def chosen(self, asking: Tensor, asked: Tensor, sizes: Tensor, scale: float) -> Tensor:
        """Which clusters of keys each cluster of queries reads, ``(sets, queries, keys)``.

        Args:
            asking: centroids of queries; asked: of keys, as many sets; sizes: tokens of the latter.
        """
        scores = torch.bmm(asking, asked.mT) * scale
        if self.top_p >= 1:  # in float32 a sum of shares may pass 1 early, or never
            return torch.ones_like(scores, dtype=torch.bool)
        paid = scores.softmax(-1) * sizes.unsqueeze(1)
        paid = paid / paid.sum(-1, keepdim=True).clamp_min(1e-12)
        largest, at = paid.sort(dim=-1, descending=True, stable=True)
        first = torch.arange(self.keys, device=scores.device) < int(self.least * self.keys)
        before = torch.nn.functional.pad(largest.cumsum(-1), (1, 0))[..., :-1]  # the one that crosses is kept
        taken = (before <= self.top_p) | first
        return torch.zeros_like(taken).scatter(-1, at, taken)

    def listing(
        self, q: Tensor, k: Tensor, scale: float, before: tuple[Tensor, Tensor] | None, iterations: int
    ) -> tuple[Tensor, Blocks, Tensor, Tensor]:
        """Where queries stand, int64 ``(batch * heads, places)`` with -1 for none, the blocks of keys that their blocks read,
        and the centroids of queries and of keys."""
        groups = q.shape[1] // k.shape[1]
        (q_labels, asking), (k_labels, asked) = self.centroids(q, k, before, iterations)
        more = 1 if self.text else 0
        rows = Layout.of(q_labels, self.queries + more, self.block)
        columns = Layout.of(k_labels, self.keys + more, self.block).repeated(groups)
        kept = self.chosen(asking, asked.repeat_interleave(groups, 0), columns.sizes[:, : self.keys], scale)
        kept = torch.nn.functional.pad(kept, (0, more, 0, more), value=True)
        # One cluster more on either side, of the blocks that hold nothing.
        kept = torch.nn.functional.pad(kept, (0, 1, 0, 1))
        grid = kept.gather(1, rows.owner.unsqueeze(-1).expand(-1, -1, kept.shape[2]))
        grid = grid.gather(2, columns.owner.unsqueeze(1).expand(-1, grid.shape[1], -1))
        return rows.order, Blocks.of(grid, self.block, columns.order.int()), asking, asked

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, listed: Blocks) -> Tensor:
        """Attention of ``(batch, heads, tokens, d)`` over what :meth:`listing` lists."""
        batch, heads, tokens, width = q.shape
        run = KERNELS.get(q.device.type, BLOCK_SPARSE)
        at = rows.clamp_min(0).view(batch, heads, -1, 1).expand(-1, -1, -1, width)
        made, _ = run(q.gather(2, at), k, v, listed.blocks, listed.counts, listed.size, -1, False, scale, listed.order)
        place = places_of(rows, tokens).view(batch, heads, tokens, 1)
        return made.gather(2, place.expand(-1, -1, -1, v.shape[3]))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, before: tuple[Tensor, Tensor] | None, iterations: int
    ) -> list[Tensor]:
        """Attention, and the centroids of queries and of keys, for the next step to begin with."""
        rows, listed, asking, asked = self.listing(q, k, scale, before, iterations)
        return [self.attend(q, k, v, scale, rows, listed), asking, asked]


def cannot_cluster(attention: Attention, text: int = 0) -> str | None:
    """Why the tokens of an attention are not all seen by all, of one sequence or beside ``text``; None if they are."""
    node = attention.node
    if not isinstance(node, fx.Node):
        return "it is no attention that passes can edit"
    if attention.kind == "joint" and not text:
        return "text and video attend jointly: text=N tells how many tokens of text there are, in front, or behind with a minus"
    if attention.kind in ("cross", "channel"):
        return f"it is {attention.kind} attention; the method is for self-attention of one sequence"
    spec, (q, k) = spec_of(node), (value(n) for n in node.args[:2])
    if q.dim() != 4:
        return "queries, keys and values are not (batch, heads, tokens, d)"
    if spec.causal or spec.bias in ("causal", "sliding_window"):
        return "it is causal; the method is for attention of all tokens to all tokens"
    if spec.bias != "none" or (why := changed_scores(spec)) is not None:
        return "a mask is added to its scores" if spec.bias != "none" else why
    if not known(q.shape[2] == k.shape[2]):
        return f"{q.shape[2]} queries read {k.shape[2]} keys; the method is for self-attention"
    return None
