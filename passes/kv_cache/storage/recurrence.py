"""Gated linear attention behind a short convolution: a cache layer of constant size, the storage of LAWCAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import RowFormat, buffer
from accelpass.ir.kv.storage import Held, Layout, New, Query, Storage
from accelpass.ir.torch_private import assert_async

WEIGHTS = ("conv_q", "conv_k", "map_q", "map_k", "gate", "bias")
"""What is learnt: kernels ``(heads, d, taps)``, the current token's first; maps ``(heads, d, features)``; gates ``(kv_heads, d)`` and
``(kv_heads,)``."""
CHUNK = 64
"""Tokens of a prompt that are computed at once."""
_EPS = 1e-6
NOT_CAUSAL = (
    "lawcat: a mask that the call was given is not causal: a token sees later ones, or not all before it. Leave the pass out, or exclude "
    "the sites with such a mask"
)


def convolved(x: Tensor, kernel: Tensor, before: Tensor) -> Tensor:
    """Each channel of ``x (batch, heads, tokens, d)`` as a sum over a token and those before it; ``before``: the last of earlier ones."""
    taps, tokens = kernel.shape[-1], x.shape[2]
    wide = torch.cat([before.to(x.dtype), x], 2)
    parts = [kernel[:, None, :, j] * wide.narrow(2, taps - 1 - j, tokens) for j in range(taps)]
    return torch.stack(parts).sum(0)


def features(x: Tensor, weight: Tensor) -> Tensor:
    """The feature map, ``(batch, heads, tokens, 2 features)``, none below 0: softmax of a linear map, and of its negative."""
    mapped = torch.matmul(x, weight)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``S <- g S + k^T [v, 1]``; the output is ``q S`` over its last channel. Chunk by chunk, and in float32.

    Args:
        q: features ``(batch, kv_heads, groups, tokens, f)``; k: ``(batch, kv_heads, tokens, f)``; v: ``(batch, kv_heads, tokens, d)``.
        log_gate: ``(batch, kv_heads, tokens)``, none above 0; state: ``(batch, kv_heads, f, d + 1)``.

    Returns:
        ``(batch, kv_heads, groups, tokens, d)`` and the state after the last token.
    """
    tokens = k.shape[2]
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if isinstance(tokens, int) and tokens == 1:
        state = log_gate.exp().unsqueeze(-1) * state + k.transpose(-1, -2) * v
        return _normalised(torch.matmul(q.squeeze(3), state)).unsqueeze(3), state
    size = min(CHUNK, tokens) if isinstance(tokens, int) else CHUNK
    chunks = (tokens + size - 1) // size
    more = chunks * size - tokens

    def parted(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = more
        wide = torch.cat([x, x.new_zeros(shape)], dim)
        return wide.reshape(*x.shape[:dim], chunks, size, *x.shape[dim + 1 :])

    q, k, v, gate = parted(q, 3), parted(k, 2), parted(v, 2), parted(log_gate, 2)
    inside = gate.cumsum(-1)  # within a chunk, so that nothing underflows over long texts
    whole = inside[..., -1]  # (batch, kv_heads, chunks)
    # What comes into each chunk: of earlier ones, and of the state.
    added = torch.einsum("bhncf,bhnc,bhncd->bhnfd", k, (whole.unsqueeze(-1) - inside).exp(), v)
    ends = whole.cumsum(-1)
    begins = ends - whole
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=q.device).tril(-1)
    lasting = (begins.unsqueeze(-1) - ends.unsqueeze(-2)).clamp_max(0).exp() * earlier
    entering = torch.einsum("bhnm,bhmfd->bhnfd", lasting, added) + torch.einsum("bhn,bhfd->bhnfd", begins.exp(), state)
    last = (ends[..., -1:] - ends).exp()
    state = torch.einsum("bhn,bhnfd->bhfd", last, added) + ends[..., -1].exp()[..., None, None] * state
    # Within a chunk each token sees those up to itself.
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    near = (inside.unsqueeze(-1) - inside.unsqueeze(-2)).clamp_max(0).exp() * causal
    scores = torch.einsum("bhgncf,bhnef->bhgnce", q, k) * near.unsqueeze(2)
    out = torch.einsum("bhgnce,bhned->bhgncd", scores, v)
    out = out + torch.einsum("bhgncf,bhnfd,bhnc->bhgncd", q, entering, inside.exp())
    return _normalised(out.flatten(3, 4).narrow(3, 0, tokens)), state


def _normalised(out: Tensor) -> Tensor:
    return out[..., :-1] / (out[..., -1:] + _EPS)


def attended(
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Mapping[str, Tensor],
    real: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The attention ``(batch, heads, tokens, d_v)`` in float32, and what is held after it.

    Args:
        weights: :data:`WEIGHTS` by name.
        q: as attention reads it, ``(batch, heads, tokens, d)``; k, v: ``(batch, kv_heads, tokens, ...)``.
        held: ``sum``, ``last_q`` and ``last_k``; see :class:`Recurrence`.
        real: which tokens are no padding, ``(batch, tokens)``; None for all. Padding is as if it were not there.
    """
    given = {name: weights[name].float() for name in WEIGHTS}
    q, k, v = q.float(), k.float(), v.float()
    if real is not None:
        q, k = (torch.where(real[:, None, :, None], x, 0.0) for x in (q, k))
    log_gate = F.logsigmoid(torch.einsum("bhtd,hd->bht", k, given["gate"]) + given["bias"][:, None])
    tails = {
        f"last_{name}": torch.cat([held[f"last_{name}"].float(), x], 2)[:, :, x.shape[2] :]
        for name, x in (("q", q), ("k", k))
    }
    queries = features(convolved(q, given["conv_q"], held["last_q"]), given["map_q"])
    keys = features(convolved(k, given["conv_k"], held["last_k"]), given["map_k"])
    if real is not None:
        keys = keys * real[:, None, :, None]
        log_gate = torch.where(real[:, None], log_gate, 0.0)
    out, state = linear_attention(queries.unflatten(1, (k.shape[1], -1)), keys, v, log_gate, held["sum"])
    return out.flatten(1, 2), {"sum": state, **tails}


def is_causal(sees: Tensor, real: Tensor) -> Tensor:
    """Whether each real token sees the real ones up to itself and no others, a scalar.

    Args:
        sees: ``(batch, heads, tokens, tokens)``; real: ``(batch, tokens)``. Padding may see real tokens, nothing at all, or everything, as
            softmax over nothing would be NaN; not padding alone, which would be a text of its own.
    """
    sees = sees.all(1) | (sees.any(1) & ~real.unsqueeze(-1))
    wanted = real.unsqueeze(1).expand_as(sees).tril()
    padding = (sees <= real.unsqueeze(1)).all(-1) | sees.all(-1)
    return torch.where(real, (sees == wanted).all(-1), padding).all()


@dataclass(frozen=True)
class Recurrence(Storage):
    """A sum over all tokens in the place of their keys and values; prompts and later tokens are computed from it alike.

    Buffers: ``sum (kv_heads, 2 features, d_v + 1)`` in float32, whose last channel is what outputs are divided by, and the last ``taps - 1``
    queries and keys for the convolutions. None has a row for each token. A call hands it :data:`WEIGHTS` (``New.given``).
    """

    part: ClassVar[str] = "recurrence"
    knows_held: ClassVar[bool] = True
    computes_prompts: ClassVar[bool] = True
    features: int = 32
    taps: int = 4

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, past = layout.kv_heads, self.taps - 1
        return [
            buffer("sum", (heads, 2 * self.features, layout.value_width + 1), torch.float32),
            buffer("last_q", (heads * layout.groups, past, layout.width), torch.float32),
            buffer("last_k", (heads, past, layout.width), torch.float32),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        self._attended(held, new, None)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        # A single token is no padding, and masks of later calls hide what the sum has left out.
        real = None if query.one else query.real(new)
        if query.spec.bias == "tensor" and real is not None:
            sees = query.sees(new)
            assert sees is not None
            assert_async(is_causal(sees, real), NOT_CAUSAL)
        return self._attended(held, new, real).to(query.dtype)

    def _attended(self, held: Held, new: New, real: Tensor | None) -> Tensor:
        out, after = attended(new.given, new.q, new.k, new.v, held, real)
        for name, t in after.items():
            held[name].copy_(t)
        return out
