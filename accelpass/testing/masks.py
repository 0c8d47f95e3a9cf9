"""Odd masks: an attention that is not plainly causal stays what it is, or a pass refuses it.

A pass that takes a prefix mask, a window or padding for causal attention gives wrong numbers without an error. Here a small attention
has each of these masks, and a pass is held to two things: at its identity setting nothing changes, and at its working setting no
token reads the value of one that the mask hides from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accelpass.testing.findings import Finding, failed, passed
from accelpass.testing.masked_decoders import MASKED_DECODERS
from accelpass.testing.numbers import attempt, check_identity
from accelpass.testing.subjects import Subject
from accelpass.testing.trial import Trial, difference, fresh, took

WIDTH, HEADS, TOKENS, BATCH = 32, 4, 24, 2
_LOW = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Mask:
    """What an attention does to its scores.

    Attributes:
        seen: True where a query sees a key, of a number of tokens: ``(batch or 1, n, n)``.
        given: the mask comes in as an argument of the model; otherwise the model makes it of positions.
        bias: what is added to scores, ``(heads, n, n)``.
        cap: scores are squeezed to ``cap * tanh(score / cap)``.
        sinks: each head has a score more, whose value is nothing.
    """

    seen: Callable[[int], Tensor]
    given: bool = False
    bias: Callable[[int], Tensor] | None = None
    cap: float = 0.0
    sinks: bool = False


def _at(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


def _causal(n: int) -> Tensor:
    row, column = _at(n)
    return (column <= row)[None]


def _prefix(n: int) -> Tensor:
    """The first third sees itself in both directions."""
    return _causal(n) | (torch.arange(n) < n // 3)


def _window(n: int) -> Tensor:
    row, column = _at(n)
    return _causal(n) & (row - column < n // 3)


def _packed(n: int) -> Tensor:
    """Three texts in one row."""
    row, column = _at(n)
    return _causal(n) & (3 * row // n == 3 * column // n)


def _both_ways(n: int) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool)


def _padded(left: bool) -> Callable[[int], Tensor]:
    """The second sequence is shorter by a quarter; a row of padding sees all, as transformers has it."""

    def seen(n: int) -> Tensor:
        real = torch.ones(BATCH, n, dtype=torch.bool)
        real[1, slice(0, n // 4) if left else slice(n - n // 4, n)] = False
        allowed = _causal(n) & real[:, None]
        return allowed | ~allowed.any(-1, keepdim=True)

    return seen


def _distances(n: int) -> Tensor:
    row, column = _at(n)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return slopes[:, None, None] * (column - row)


def _drawn(n: int) -> Tensor:
    return torch.randn(HEADS, n, n, generator=torch.Generator().manual_seed(3))


MASKS: dict[str, Mask] = {
    "causal": Mask(_causal),
    "causal, as an argument": Mask(_causal, given=True),
    "both ways": Mask(_both_ways),
    "prefix": Mask(_prefix),
    "prefix, as an argument": Mask(_prefix, given=True),
    "window": Mask(_window),
    "window, as an argument": Mask(_window, given=True),
    "packed texts": Mask(_packed),
    "packed texts, as an argument": Mask(_packed, given=True),
    "padding on the left": Mask(_padded(True), given=True),
    "padding on the right": Mask(_padded(False), given=True),
    "soft-capped": Mask(_causal, cap=2.0),
    "distances (ALiBi)": Mask(_causal, bias=_distances),
    "any bias": Mask(_causal, bias=_drawn, given=True),
    "sinks": Mask(_causal, sinks=True),
}


class MaskedAttention(nn.Module):
    """One attention of a text. Queries and keys are made of the first half of its channels, values of the second."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        with torch.no_grad():
            self.q_proj.weight[:, WIDTH:] = self.k_proj.weight[:, WIDTH:] = self.v_proj.weight[:, :WIDTH] = 0

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``(batch, tokens, 2 * WIDTH)``; scores: what is added, ``(batch or 1, heads or 1, tokens, tokens)``, if it is given.
        """
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if not self.mask.given:
            scores = additive(self.mask, x.shape[1])
        if self.mask.cap or self.mask.sinks:
            made = self._by_hand(q, k, v, scores)
        elif self.mask.seen is _causal and self.mask.bias is None and not self.mask.given:
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            made = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.o_proj(made.transpose(1, 2).flatten(2))

    def _by_hand(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
        s = (q @ k.mT) * q.shape[-1] ** -0.5
        if self.mask.cap:
            s = self.mask.cap * torch.tanh(s / self.mask.cap)
        s = s if scores is None else s + scores
        if self.mask.sinks:
            s = torch.cat([s, self.sinks.view(1, HEADS, 1, 1).expand(len(s), -1, s.shape[2], 1)], -1)
            return s.softmax(-1)[..., :-1] @ v
        return s.softmax(-1) @ v


def additive(mask: Mask, tokens: int) -> Tensor:
    """A mask as what is added to scores, ``(batch or 1, heads or 1, tokens, tokens)``."""
    seen = torch.where(mask.seen(tokens), 0.0, _LOW).unsqueeze(1)
    return seen if mask.bias is None else seen + mask.bias(tokens).unsqueeze(0).clamp_min(_LOW / 2)


def check_masks(
    trial: Trial, masks: dict[str, Mask] | None = None, decoders: Sequence[Subject] = MASKED_DECODERS
) -> list[Finding]:
    """An attention with each of :data:`MASKS` is exact at the identity setting, reads nothing hidden, or is refused.

    Decoders with a cache are exact at the identity setting or refused.
    """
    found = [_check(trial, name, mask) for name, mask in (MASKS if masks is None else masks).items()]
    return found + [replace(check_identity(trial, decoder), check="masks") for decoder in decoders]


def _check(trial: Trial, name: str, mask: Mask) -> Finding:
    subject = Subject(f"mask: {name}", lambda seed: _model(mask, seed), lambda fast, model, shape: iter(()))

    def body() -> Finding:
        model = subject.build(0)
        x = torch.randn(BATCH, TOKENS, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
        more = (additive(mask, TOKENS),) if mask.given else ()
        with torch.no_grad():
            want = model(x, *more)
            error = None
            if trial.identity is not None:
                error = difference([trial.compile(model, [trial.made(identity=True)])(x, *more)], [want])
                if error > trial.tolerance:
                    shown = dict(trial.identity) or "as it is"
                    return failed("masks", subject.name, f"at {shown}, against the dense model", _LOOK, error)
                fresh()
            fast = trial.compile(model, [trial.made()])
            before = fast(x, *more)
            read = [
                token for token in (0, TOKENS // 3, TOKENS - 1) if _reads(fast, x, more, before, mask, token, trial)
            ]
            if read:
                said = f"the value of token {read[0]} reaches tokens from which the mask hides it"
                return failed("masks", subject.name, said, _LOOK)
        sites = took(model, trial.name)
        what = "nothing hidden is read" if sites else "it is left as it is"
        return passed("masks", subject.name, what, error)

    return attempt("masks", trial, subject, body)


def _reads(
    fast: Callable[..., Tensor],
    x: Tensor,
    more: tuple[Tensor, ...],
    before: Tensor,
    mask: Mask,
    token: int,
    trial: Trial,
) -> bool:
    """Whether a token's value reaches one that does not see it."""
    moved = x.clone()
    moved[:, token, WIDTH:] += 3
    after = fast(moved, *more)
    hidden = ~mask.seen(TOKENS)[..., token].expand(BATCH, -1)
    change = (after - before).abs().amax(-1)[hidden]
    return bool(change.numel()) and float(change.max()) > trial.tolerance * float(before.abs().max())


def _model(mask: Mask, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedAttention(mask).eval()


_LOOK = "what the pass takes for causal attention: read spec.bias, spec.causal and the steps before the softmax, and skip what differs"
