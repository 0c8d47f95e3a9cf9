"""PBS-Attn in eager torch, as its card has it."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes import kv_truth


def oracle(q: Tensor, k: Tensor, v: Tensor, b: int, g: int, th: float, scale: float) -> tuple[Tensor, Tensor]:
    """The card's ``pbs_attention`` for one sequence, k and v repeated; also which (query, token) pairs are attended to."""
    heads, n, d = q.shape
    ns = n // g * g
    pos = torch.arange(n).expand(heads, n).clone()
    if ns:
        s = ((q[:, -min(b, n) :] @ k[:, :ns].transpose(1, 2)).float() * scale).softmax(-1).mean(1)
        p = s.view(heads, ns // g, g).argsort(dim=-1, descending=True, stable=True)
        pos[:, :ns] = (p + (torch.arange(ns // g) * g)[None, :, None]).reshape(heads, ns)
    ix = pos[..., None].expand(-1, -1, d)
    kp = k.gather(1, ix)
    vp = v.gather(1, pos[..., None].expand(-1, -1, v.shape[-1]))
    nb = -(-n // b)
    blk, seg = torch.arange(n) // b, (torch.arange(nb) * b) // g

    def pool(x: Tensor) -> Tensor:
        return torch.zeros(heads, nb, d).index_add(1, blk, x.float()) / torch.bincount(blk)[None, :, None]

    scores = pool(q) @ pool(kp).transpose(1, 2) * scale
    early = seg[None, :] < seg[:, None]
    shares = torch.nan_to_num(scores.masked_fill(~early, float("-inf")).softmax(-1))
    w, o = shares.sort(-1, descending=True)
    take = (w.cumsum(-1) - w) < th
    sel = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, o, take) & early
    if th >= 1:
        sel |= early
    zero_blk = (pos == 0).int().argmax(-1) // b
    sel[torch.arange(heads), :, zero_blk] = True
    sel |= seg[None, :] == seg[:, None]
    m = sel[:, blk][:, :, blk] & (pos[:, None, :] <= torch.arange(n)[None, :, None])
    a = ((q @ kp.transpose(1, 2)).float() * scale).masked_fill(~m, float("-inf")).softmax(-1)
    return a.to(v.dtype) @ vp, torch.zeros_like(m).scatter(-1, pos[:, None, :].expand_as(m), m)


class PBSOracle(kv_truth.Oracle):
    """Prompts as the card has it, later tokens dense."""

    def __init__(self, b: int, g: int, th: float):
        super().__init__()
        self.settings = b, g, th

    def attend(self, layer, q, k, v, scale, mask, index):
        if q.shape[2] != k.shape[2]:
            return kv_truth.mixed(kv_truth.probabilities(q, k, scale, mask), v)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return torch.stack([oracle(*one, *self.settings, scale)[0] for one in zip(q, k, v, strict=True)])
