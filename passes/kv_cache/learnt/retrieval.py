"""Semantic retrieval heads, and what eviction costs each layer: the two measurements of CompressKV (arXiv 2508.02401)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.errors import PassError
from accelpass.passes.core.base import Study
from accelpass.passes.kv_cache.storage.heavy_hitters import pooled

OBSERVED = 64
"""Queries of a prompt that a study keeps."""
FOUND = 0.5
"""Texts count whose answer the model gives to more than this share: of tokens, each after the right ones (inferred; the authors' gate is
ROUGE-1 recall of an answer of its own)."""


@dataclass(frozen=True)
class Kept:
    """How many tokens a layer keeps of a prompt, the attention of how many last queries says which, over how many neighbours."""

    tokens: int
    window: int
    kernel: int


def rankings(study: Study) -> dict[str, list[int]]:
    """Query heads of each layer by the attention that they pay to a needle while the answer repeats it, most first.

    Of each token of the answer that is among the needle's, the probability that its query gives to all of the needle counts. The first
    token of an answer does not: its query is the prompt's last (inferred).

    Raises:
        PassError: no text counts.
    """
    whole: dict[str, Tensor] = {}
    here: dict[str, Tensor] = {}
    needles: dict[int, Tensor] = {}
    tried = counted = 0

    def attend(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = probabilities(spec, q, k)
        ids, found = study.batch["input_ids"], needles.get(id(study.batch))
        needle = needles.setdefault(id(study.batch), needle_of(study.batch)) if found is None else found
        first = k.shape[2] - q.shape[2]
        made = ids[:, first + 1 : first + 1 + q.shape[2]]  # what each query is answered with
        among = torch.stack([torch.isin(m, i[n]) for m, i, n in zip(made, ids, needle, strict=True)])
        mass = (p * needle[:, None, None, : k.shape[2]]).sum(-1)
        here[spec.site] = (mass * among[:, None]).sum(-1)  # (batch, heads)
        return torch.matmul(p, v.float().repeat_interleave(spec.groups, 1)).to(q.dtype)

    def seen(logits: Tensor) -> None:
        nonlocal tried, counted
        labels = study.batch.get("labels", study.batch["input_ids"])[:, -logits.shape[1] :]
        right = (logits.argmax(-1) == labels).sum(-1) / (labels >= 0).sum(-1).clamp_min(1)
        counts = (right > FOUND) & needles[id(study.batch)].any(-1)
        tried, counted = tried + len(counts), counted + int(counts.sum())
        for site, mass in here.items():
            whole[site] = whole.get(site, torch.zeros_like(mass[0], dtype=torch.float64)) + mass[counts].double().sum(0)

    study.decoded(attend, "retrieval heads", seen)
    if wrong := [site for site, mass in whole.items() if not mass.isfinite().all()]:
        raise PassError(f"compresskv: {wrong[0]}: its attention is not finite; check model and texts")
    if not any(bool(mass.any()) for mass in whole.values()):
        raise PassError(
            f"compresskv: none of {tried} texts tells retrieval heads: the model must find the answer (it did in {counted}), and the "
            "answer repeat a needle of the text: give labels for the answer alone, and needle=True where the text has it"
        )
    return {site: mass.argsort(descending=True, stable=True).tolist() for site, mass in whole.items()}


def errors(study: Study, kept: Kept, heads: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Each layer's part of what keeping few tokens of a prompt changes in its attention block's output, mean over batches.

    Of each decoded token the change, relative to the output; all layers keep few at once, so that what one changes reaches the next.
    """
    wanted: dict[tuple[int, str], Tensor] = {}
    lost: dict[tuple[int, str], float] = {}

    def whole(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.matmul(probabilities(spec, q, k), v.float().repeat_interleave(spec.groups, 1)).to(q.dtype)
        wanted[id(study.batch), spec.site] = study.projected(spec.site, out).float()
        return out

    def few(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = k.shape[2] - q.shape[2]
        left = chosen(spec, study.last_queries(spec.site), k[:, :, :tokens], heads[spec.site], kept)
        read = torch.ones(len(q), 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
        read[..., :tokens] = torch.zeros_like(read[:, 0, 0, :tokens]).scatter(1, left, True)[:, None, None]
        out = torch.matmul(probabilities(spec, q, k, read), v.float().repeat_interleave(spec.groups, 1)).to(q.dtype)
        full = wanted[id(study.batch), spec.site]
        change = (study.projected(spec.site, out).float() - full).norm(dim=(0, 2)) / (full.norm(dim=(0, 2)) + 1e-5)
        lost[id(study.batch), spec.site] = float(change.sum())
        return out

    study.decoded(whole, "all tokens")
    study.decoded(few, f"{kept.tokens} tokens a layer")
    parts: dict[str, float] = {}
    for batch in dict.fromkeys(at for at, _ in lost):
        total = sum(e for (at, _), e in lost.items() if at == batch) or 1.0
        for (at, site), e in lost.items():
            if at == batch:
                parts[site] = parts.get(site, 0.0) + e / total
    total = sum(parts.values()) or 1.0
    return {site: part / total for site, part in parts.items()}


def chosen(spec: AttentionSpec, q: Tensor, k: Tensor, heads: Sequence[int], kept: Kept) -> Tensor:
    """Which tokens of a prompt stay, ``(batch, tokens)``.

    Args:
        q: its last queries, ``(batch, heads, queries, d)``; k: its keys, ``(batch, kv_heads, tokens, d)``.
    """
    tokens, window = k.shape[2], min(kept.window, q.shape[2], k.shape[2])
    newest = torch.arange(tokens - window, tokens, device=k.device).expand(len(k), -1)
    if tokens <= kept.tokens:
        return torch.arange(tokens, device=k.device).expand(len(k), -1)
    score = probabilities(spec, q[:, :, -window:], k)[:, list(heads)].sum(2)[..., : tokens - window]
    best = pooled(score, kept.kernel, "mean").mean(1).topk(kept.tokens - window).indices
    return torch.cat([best, newest], 1)


def probabilities(spec: AttentionSpec, q: Tensor, k: Tensor, read: Tensor | None = None) -> Tensor:
    """Of the last tokens' queries over all keys, float32 ``(batch, heads, queries, tokens)``; ``read``: of some keys alone."""
    rows, tokens = q.shape[2], k.shape[2]
    scores = torch.matmul(q.float(), k.float().repeat_interleave(spec.groups, 1).mT) * spec.scale
    sees = torch.ones(rows, tokens, dtype=torch.bool, device=q.device).tril(tokens - rows)
    sees = sees if read is None else sees & read
    return scores.masked_fill(sees.logical_not(), float("-inf")).softmax(-1)


def needle_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Where the text has what its answer repeats, bool ``(batch, tokens)``: as given, or the longest run of two tokens or more."""
    ids = batch["input_ids"]
    if "needle" in batch:
        return batch["needle"].to(ids.device).bool()
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, of in enumerate(batch.get("labels", ids)):
        answer = of >= 0
        begins = int(answer.long().argmax())
        run, best = torch.zeros(begins, dtype=torch.long, device=ids.device), 1
        for token in of[answer]:
            run = torch.where(ids[row, :begins] == token, torch.nn.functional.pad(run, (1, 0))[:begins] + 1, 0)
            if len(run) and int(run.max()) > best:
                best, end = int(run.max()), int(run.argmax()) + 1
                found[row] = False
                found[row, end - best : end] = True
    return found
