"""What rounding costs a sentence encoder: how alike its embeddings stay, and how well they still rank passages of text.

The text is Python's own reference, which every CPython ships: paragraphs of 79 topics. A paragraph is to find others of its topic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelpass.models_zoo.minilm import embed

Passages = list[tuple[str, str]]
"""Topic and text."""
LENGTHS = (200, 600)
"""Characters of a paragraph that counts: neither a heading nor a table."""
BATCH = 32


def passages(count: int) -> tuple[Passages, list[str]]:
    """Paragraphs that are scored, spread over all topics, and those between them, which methods may learn from."""
    from pydoc_data.topics import topics

    parts = ((topic, part) for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    # Topics quote each other: a paragraph is of the first that has it.
    first = {" ".join(p.split()): topic for topic, p in reversed([*parts]) if LENGTHS[0] <= len(p) <= LENGTHS[1]}
    held = [(topic, text) for text, topic in reversed(first.items())]
    step = max(2, len(held) // count)
    return held[::step][:count], [text for number, (_, text) in enumerate(held) if number % step]


def embeddings(model: Any, tokenizer: Any, scored: Passages) -> Tensor:
    """Unit vectors ``(passages, 384)``; passages of similar length share a batch."""
    order = sorted(range(len(scored)), key=lambda i: len(scored[i][1]))
    made = torch.cat([embed(model, tokenizer, [scored[i][1] for i in part]) for part in _parts(order)])
    return made[torch.tensor(order).argsort()]


def figures(made: Tensor, dense: Tensor, scored: Passages) -> dict[str, float]:
    """What is told of embeddings.

    ``cosine``, ``least_cosine``: to the float model's, the mean and the least of all passages. ``rank_correlation``: Spearman's, of each
    passage's similarities to all others with those of the float model, the mean. ``reciprocal_rank``: mean of one over the place of the
    first passage of the same topic.
    """
    cosine = (made * dense).sum(-1)
    mine, its = similarities(made), similarities(dense)
    places = [side.argsort(1).argsort(1).double() for side in (mine, its)]
    a, b = (side - side.mean(1, keepdim=True) for side in places)
    correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return {
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
        "rank_correlation": float(correlation.mean()),
        "reciprocal_rank": reciprocal_rank(mine, [topic for topic, _ in scored]),
    }


def similarities(made: Tensor) -> Tensor:
    """Of each embedding to all others, itself left out: ``(passages, passages - 1)``."""
    count = len(made)
    return (made @ made.t())[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)


def reciprocal_rank(similar: Tensor, topics: list[str]) -> float:
    """Of the first passage of the same topic, averaged over passages whose topic has another."""
    found = []
    for number, row in enumerate(similar):
        others = [topic for at, topic in enumerate(topics) if at != number]
        same = torch.tensor([topic == topics[number] for topic in others])
        if same.any():
            ranked = same[row.argsort(dim=-1, descending=True, stable=True)]
            found.append(1 / (1 + int(ranked.int().argmax())))
    return sum(found) / len(found)


def _parts(order: list[int]) -> list[list[int]]:
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
