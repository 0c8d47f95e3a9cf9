"""The loop of a masked-diffusion language model: read the whole text, fill in what is certain, block after block."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accelpass.decoding.interfaces import DecodingError
from accelpass.decoding.masked.rows import RowCache


class Rule(Protocol):
    """Which masked tokens become text."""

    def __call__(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """
        Args:
            logits: ``(batch, rows, vocabulary)``.
            allowed: rows that are masked and may be filled in, bool ``(batch, rows)``.

        Returns:
            Some of ``allowed``, at least one of each line that has any.
        """
        ...


@dataclass
class StepStatistics:
    """What the last text took: ``calls`` of the model, ``tokens`` that it filled in of each line, ``rows`` that a line's calls computed."""

    calls: int = 0
    tokens: int = 0
    rows: int = 0

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / self.calls if self.calls else 0.0


class Step(nn.Module):
    """What becomes of a text ``(batch, rows)`` when the model's logits of its rows are known: tensors alone, of static shape.

    Exported with a model around it, it is a step of an ONNX file; its caller loops while ``left``.
    """

    def __init__(self, rule: Rule, mask_id: int) -> None:
        super().__init__()
        self.rule, self.mask_id = rule, mask_id

    def forward(self, logits: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The text, and ``(left, broken)``: whether masks are left, and whether a logit of one is not a number.

        The mask itself is never filled in (the released code lets it; a model that says it would not end).
        """
        ids = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(ids == self.mask_id, -math.inf)
        allowed = text == self.mask_id
        broken = (logits.isnan().any(-1) & allowed).any()
        text = torch.where(self.rule(logits, allowed), logits.argmax(-1), text)
        return text, torch.stack([(text == self.mask_id).any(), broken])


class MaskedDecoder:
    """Writes after prompts: masks stand for what comes, and each step fills in those that the rule takes.

    Likeliest tokens; what is filled in stays. A batch goes on until all of its lines are done with a block. Every step is one read from the
    device.

    Args:
        rule: which of the masked tokens become text.
        block: tokens of a block; one is done before the next begins. The last takes what the others leave over.
        shifted: the logits of a token are those of the row before it, as in models that were causal once (Dream).
        cached: within a block, only its rows are computed, and the others' keys and values stay what they were as it began. It saves, and
            approximates: the others' states would follow what is filled in.
        mask_id: the mask's token; None: the model's ``config.mask_token_id``.
    """

    def __init__(
        self, rule: Rule, block: int = 32, *, shifted: bool = False, cached: bool = False, mask_id: int | None = None
    ) -> None:
        if block < 1:
            raise DecodingError(f"block={block}: tokens of a block, at least 1; the paper's is 32")
        self.rule, self.block, self.shifted, self.cached, self.mask_id = rule, block, shifted, cached, mask_id
        self.statistics = StepStatistics()

    @torch.no_grad()
    def __call__(
        self, model: Any, ids: Tensor, new_tokens: int, *, mask: Tensor | None = None, call: Any = None
    ) -> Tensor:
        """The prompts ``(batch, tokens)`` and what the model writes after them, ``(batch, tokens + new_tokens)``.

        Args:
            model: reads a whole text in both directions: ``model(ids).logits``.
            mask: 1 for tokens, 0 for padding at the left, ``(batch, tokens)``.
            call: the compiled model, if ``model`` is not compiled in place.

        Raises:
            DecodingError: a causal model, a model without a mask token, masks in the prompt, logits that are not numbers.
        """
        text = ids
        for text in self.steps(model, ids, new_tokens, mask=mask, call=call):  # noqa: B007
            pass
        return text

    @torch.no_grad()
    def steps(
        self, model: Any, ids: Tensor, new_tokens: int, *, mask: Tensor | None = None, call: Any = None
    ) -> Iterator[Tensor]:
        """The text after each step, masks in it, as :meth:`__call__` makes it."""
        step = Step(self.rule, self._mask_id(model))
        if new_tokens < 1 or not ids.shape[1] or bool((ids == step.mask_id).any()):
            raise DecodingError(
                f"new_tokens={new_tokens}, a prompt of {ids.shape[1]} tokens: at least one of each, and no mask ({step.mask_id}) in the prompt"
            )
        _refuse_causal(model, ids, step.mask_id)
        text = torch.cat([ids, ids.new_full((len(ids), new_tokens), step.mask_id)], 1)
        reader = _Reads(model, call, mask, text.shape, self.shifted)
        self.statistics = StepStatistics(tokens=new_tokens)
        blocks = max(1, new_tokens // self.block)
        for number in range(blocks):
            start = ids.shape[1] + number * self.block
            end = text.shape[1] if number + 1 == blocks else start + self.block
            reader.cache, left = RowCache() if self.cached else None, True
            while left:
                logits = reader.logits(text, start, end)
                self.statistics.calls += 1
                self.statistics.rows = reader.rows
                filled, flags = step(logits, text[:, start:end])
                text = torch.cat([text[:, :start], filled, text[:, end:]], 1)
                left, broken = flags.tolist()
                if broken:
                    raise DecodingError(
                        "the model's logits are not numbers (NaN); read its text in float32, or look at its weights"
                    )
                yield text

    def _mask_id(self, model: Any) -> int:
        config = getattr(model, "config", None)
        found = self.mask_id if self.mask_id is not None else getattr(config, "mask_token_id", None)
        if found is None:
            raise DecodingError(f"{type(model).__name__} names no mask token (config.mask_token_id); give mask_id=...")
        return int(found)


class _Reads:
    """Calls of one text: of all rows, or with a filled cache of a block's alone.

    Attributes:
        cache: of the block that is being written; None: every call reads the whole text.
        rows: computed so far, of a line.
    """

    def __init__(self, model: Any, call: Any, mask: Tensor | None, shape: torch.Size, shifted: bool) -> None:
        self.call, self.shift, self.rows = model if call is None else call, int(shifted), 0
        self.cache: RowCache | None = None
        accepted = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
        self.keeps = "logits_to_keep" in accepted
        self.caches = {"past_key_values", "position_ids"} <= set(accepted)
        self.more: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self.positions: Tensor | None = None
        if mask is not None:
            new = shape[1] - mask.shape[1]
            if len(mask) != shape[0] or new < 1:
                raise DecodingError(
                    f"a mask of {tuple(mask.shape)} for texts of {tuple(shape)}: it is of the prompts, (batch, tokens)"
                )
            self.more["attention_mask"] = torch.cat([mask, mask.new_ones(shape[0], new)], 1)
            if "position_ids" in accepted:
                self.positions = (self.more["attention_mask"].long().cumsum(1) - 1).clamp_min(0)

    def logits(self, text: Tensor, start: int, end: int) -> Tensor:
        """Of the tokens start to end - 1, ``(batch, tokens, vocabulary)``."""
        first, last = start - self.shift, end - self.shift
        more = dict(self.more)
        positions = self.positions
        if self.cache is not None:
            if not self.caches:
                raise DecodingError(
                    "cached=True: the model takes no past_key_values and position_ids; use cached=False"
                )
            more |= {"past_key_values": self.cache, "use_cache": True}
            if self.cache.filled:
                # All rows of the block, so that their keys follow what was filled in; with a shift, the one before as well.
                if positions is None:
                    positions = torch.arange(text.shape[1], device=text.device).expand(len(text), -1)
                at = torch.arange(first, end, device=text.device)
                self.cache.at(at)
                self.rows += len(at)
                found = self.call(text[:, first:end], position_ids=positions[:, first:end], **more).logits
                return found[:, : end - start]
            self.cache.at(None)
        self.rows += text.shape[1]
        if positions is not None:
            more["position_ids"] = positions
        if self.keeps:  # the output head is computed for the block alone
            more["logits_to_keep"] = torch.arange(first, last, device=text.device)
            return self.call(text, **more).logits
        return self.call(text, **more).logits[:, first:last]


def _refuse_causal(model: Any, ids: Tensor, mask_id: int) -> None:
    """Asks the model whether a later token changes what it says of an earlier one; two texts of two tokens, not compiled."""
    other = [token for token in (0, 1, 2) if token != mask_id][:2]
    probe = torch.tensor([[mask_id, token] for token in other], device=ids.device)
    forward = model.forward if isinstance(model, nn.Module) else model
    first = forward(probe).logits[:, 0]
    if torch.equal(first[0], first[1]):
        raise DecodingError(
            f"{type(model).__name__} is causal: it does not see what comes after a token, and a masked token is filled in from both sides. "
            "Use model.generate, or accelpass.decoding's other decoders"
        )
