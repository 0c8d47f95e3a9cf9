"""Trains multi-token prediction modules on what their own model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelpass.decoding.heads.modules import MTPHeads
from accelpass.decoding.interfaces import DecodingError


def losses(heads: MTPHeads, ids: Tensor) -> list[Tensor]:
    """Of each module, the cross entropy in nats of its prediction against the model's distribution of the same token.

    Args:
        ids: texts ``(batch, tokens)``, without padding, longer than there are modules.
    """
    with torch.no_grad():
        said = heads.trunk(ids, use_cache=False, output_hidden_states=True)
    states, wanted = said.hidden_states[-1], said.logits.float().softmax(-1)
    found = []
    for number in range(heads.depth):
        rows = ids.shape[1] - number - 1
        states = heads.rows(number, ids[:, number + 1 :], states[:, :rows])
        logits = heads.logits(number, states)
        found.append(F.cross_entropy(logits.flatten(0, 1), wanted[:, number + 1 :].flatten(0, 1)))
    return found


def distil(
    heads: MTPHeads, texts: Sequence[Tensor], steps: int = 200, rate: float = 1e-3,
    say: Callable[[int, list[float]], Any] | None = None,
) -> list[float]:  # fmt: skip
    """Train the modules, and leave the model as it is: AdamW, a rate that falls to zero along a line.

    Args:
        heads: in either mode; in eval mode afterwards.
        texts: batches of ids ``(batch, tokens)`` that are taken in turns, best of texts that the model wrote itself.
        steps: batches that are learnt from.
        say: is told the number of each step and the modules' losses.

    Returns:
        The modules' losses of the last batch, nats.

    Raises:
        DecodingError: no texts, or too short ones; a loss that is not a number.
    """
    if not texts or min(ids.shape[1] for ids in texts) < heads.depth + 2:
        raise DecodingError(
            f"{len(texts)} batches of texts: at least one, of at least {heads.depth + 2} tokens for {heads.depth} modules"
        )
    optimizer = torch.optim.AdamW(heads.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    frozen = [p for p in heads.trunk.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    heads.train()
    last: list[float] = []
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
            with torch.enable_grad():
                found = losses(heads, texts[step % len(texts)])
                total = torch.stack(found).mean()
            if not torch.isfinite(total):
                raise DecodingError(f"step {step}: the loss is {total.item()}; use a smaller rate than {rate}")
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            last = [loss.item() for loss in found]
            if say is not None:
                say(step, last)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        heads.eval()
    return last
