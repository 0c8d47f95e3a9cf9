"""Which guesses are accepted so that the text is the model's own: its likeliest tokens, or drawn as it would draw them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accelpass.decoding.interfaces import Proposal, Request, Verified


class Uniforms(NamedTuple):
    """Numbers from [0, 1), drawn before, each ``(batch, rows)``: for the token after each row, for accepting it, and in place of a guess."""

    chosen: Tensor
    accepted: Tensor
    instead: Tensor


def exact(read: Tensor, logits: Tensor, proposal: Proposal, request: Request) -> Verified:
    """The text that the model gives without guesses: token for token, or where tokens are drawn, with the same distribution.

    Of guesses that were drawn themselves: speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv
    2302.01318). Of others, in a chain or a tree: the model's token after each is chosen, and the guesses that it chose are followed.
    """
    return judged(read, logits, proposal, request.samples, request.generator)


def judged(
    read: Tensor, logits: Tensor, proposal: Proposal, samples: bool, generator: torch.Generator | Uniforms | None
) -> Verified:
    """What :func:`exact` says, of what it needs to know of a request."""
    draws = generator.chosen if isinstance(generator, Uniforms) else generator
    chosen = drawn(logits.softmax(-1), draws) if samples else logits.argmax(-1)
    if not samples or proposal.probs is None:
        return followed(read, logits, chosen, proposal)
    return resampled(read, logits, chosen, proposal.probs, generator)


def followed(read: Tensor, logits: Tensor, chosen: Tensor, proposal: Proposal) -> Verified:
    """The longest run of guesses each of which is what was chosen after the one before it."""
    if proposal.tree is not None:
        tree = proposal.tree.on(read.device)
        agrees = read[:, 1:] == chosen[:, tree.parents]
        # A node is reached if it and all above it agree; the root always is.
        above = tree.ancestors[1:, 1:]
        reached = (agrees.unsqueeze(1) | ~above).all(-1)
        best = (reached * tree.depths[1:]).argmax(-1) + 1  # the first of the deepest, as in the released code
        best = torch.where(reached.any(-1), best, 0)
        rows, counts = tree.paths[best], tree.depths[best]
        return Verified(chosen.gather(1, rows), counts, rows, read, chosen, logits)
    counts = (read[:, 1:] == chosen[:, :-1]).long().cumprod(1).sum(1)
    return Verified(chosen, counts, None, read, chosen, logits)


def resampled(
    read: Tensor, logits: Tensor, chosen: Tensor, drafts: Tensor, generator: torch.Generator | Uniforms | None
) -> Verified:
    """A guess x drawn from q is accepted with probability min(1, p(x) / q(x)); after the first that is not, a token of max(p - q, 0).

    Args:
        chosen: drawn from p after each row; those after the accepted guesses are the text's, or the next guesses of Jacobi decoding.
        drafts: q, ``(batch, guesses, vocabulary)``.
    """
    guesses = read[:, 1:]
    if not guesses.shape[1]:
        return Verified(chosen, guesses.new_zeros(read.shape[0]), None, read, chosen, logits)
    probs = logits[:, :-1].softmax(-1)
    mine, its = (p.gather(-1, guesses.unsqueeze(-1)).squeeze(-1) for p in (probs, drafts))
    again: torch.Generator | Tensor | None
    if isinstance(generator, Uniforms):
        uniform, again = generator.accepted[:, : mine.shape[1]], generator.instead[:, :1]
    else:
        uniform, again = torch.rand(mine.shape, device=mine.device, generator=generator), generator
    accepted = (
        (uniform * its < mine).long().cumprod(1)
    )  # without a division: a guess that q says is impossible is rejected or p's
    counts = accepted.sum(1)
    at = counts.clamp_max(guesses.shape[1] - 1)[:, None, None].expand(-1, 1, probs.shape[-1])
    p, q = (t.gather(1, at).squeeze(1) for t in (probs, drafts))
    rest = (p - q).clamp_min(0)
    # Where p <= q but for rounding nothing is left, and p itself is right.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    instead = drawn(rest.unsqueeze(1), again)
    number = torch.arange(read.shape[1], device=read.device)
    padded = torch.cat([guesses, guesses[:, -1:]], 1)
    tokens = torch.where(number < counts[:, None], padded, chosen)
    rejected = (number == counts[:, None]) & (counts < guesses.shape[1])[:, None]
    return Verified(torch.where(rejected, instead, tokens), counts, None, read, chosen, logits)


def drawn(probs: Tensor, generator: torch.Generator | Tensor | None) -> Tensor:
    """A token of each distribution ``(batch, rows, vocabulary)``, unnormalised or not: ``(batch, rows)``.

    Args:
        generator: draws; or numbers from [0, 1) that were drawn before, ``(batch, rows)``: the token at which the sum of the
            probabilities passes that share of all.
    """
    if isinstance(generator, Tensor):
        total = probs.cumsum(-1)
        whole = total[..., -1:]
        share = torch.minimum(
            generator.unsqueeze(-1) * whole, whole * (1 - 2**-23)
        )  # below the sum, however that is rounded
        return (total <= share).sum(-1)
    flat = torch.multinomial(probs.flatten(0, 1), 1, generator=generator)
    return flat.view(probs.shape[:2])
