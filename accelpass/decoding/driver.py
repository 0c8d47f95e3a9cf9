"""The loop: guess, read all guesses in one call, accept, forget the rest; as a ``custom_generate`` of transformers or by itself."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.acceptance import exact
from accelpass.decoding.guidance import Guidance, GuidedReader
from accelpass.decoding.interfaces import Acceptance, DecodingError, Drafter, Proposal, Proposer, Request, Verified
from accelpass.decoding.one_graph import Step
from accelpass.decoding.pace import Pace
from accelpass.decoding.reader import Reader, takes_trees

SIZES = (1, 4, 8)
"""Rows of a call. Up to 8, weights of 8 bits are multiplied as they stream by (``GEMV_ROWS`` of the CPU's kernels)."""


@dataclass
class Statistics:
    """What the last request took: ``calls`` of the model after the prompt, the ``tokens`` that they gave, calls of each size."""

    calls: int = 0
    tokens: int = 0
    rows: dict[int, int] = field(default_factory=dict)

    def note(self, rows: int, tokens: int) -> None:
        """A call of so many rows, and the tokens that it gave."""
        self.calls += 1
        self.tokens += tokens
        self.rows[rows] = self.rows.get(rows, 0) + 1

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / self.calls if self.calls else 0.0


class Decoder:
    """Several tokens a step: ``model.generate(..., custom_generate=decoder)``, or :meth:`steps`.

    Every step is one call of the model, one of few sizes, and one read from the device. It is for texts of decoders; a batch goes on
    by as many tokens as its slowest text. What ``generate`` takes is obeyed: logits processors at each position with the text before
    it, end tokens, lengths and stopping criteria after each token.

    Args:
        proposer: guesses.
        acceptance: which guesses become text.
        sizes: rows that a call may have; 1 is always among them. Each is compiled once, as a graph of its own.
        adaptive: guess only as long as it pays, by the clock; the text does not depend on it, but for draws.
        streamer: gets the prompt and each token in order. transformers hands a ``custom_generate`` no streamer, so it is given here.
        generator: draws tokens; None for torch's own.
        guidance: logits are those of two prompts together (classifier-free guidance); the cache has room for twice the batch.
        one_graph: options of a compilation (``{"passes": [...]}``): a step's model, mask, logits processors, acceptance and next token are one
            graph of it, whatever the model itself is compiled to. For the exact acceptance, an ``accelpass.KVCache``, and processors that
            ask for no more than which tokens the text has (temperature, top-k, top-p, min-p, repetition penalty).
    """

    def __init__(
        self,
        proposer: Proposer,
        acceptance: Acceptance = exact,
        *,
        sizes: Sequence[int] = SIZES,
        adaptive: bool = True,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        guidance: Guidance | None = None,
        one_graph: Mapping[str, Any] | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise DecodingError(f"sizes={tuple(sizes)}: numbers of rows, at least 1; the default is {SIZES}")
        self.proposer, self.acceptance, self.adaptive = proposer, acceptance, adaptive
        self.sizes = tuple(sorted({1, *sizes}))
        self.streamer, self.generator, self.guidance = streamer, generator, guidance
        if one_graph is not None and (acceptance is not exact or guidance is not None):
            raise DecodingError(
                "one_graph: a step's graph holds the exact acceptance, without guidance; leave one of them out"
            )
        self.one_graph = one_graph
        self._steps: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._paces: weakref.WeakKeyDictionary[Any, dict[int, Pace]] = weakref.WeakKeyDictionary()
        self.statistics = Statistics()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate`` calls with all that it has prepared; returns what it returns.

        Raises:
            DecodingError: beams, an encoder and decoder, embeddings in place of ids, a cache that gives no tokens back.
        """
        _refuse(model, generation_config, synced_gpus, model_kwargs, logits_processor)
        cache = model_kwargs["past_key_values"]
        request = Request(
            model, input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"),
            generation_config.max_length, logits_processor if logits_processor else None,
            generation_config.do_sample, self.generator,
        )  # fmt: skip
        pad = generation_config.pad_token_id
        pieces = [input_ids]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        for new in self._run(request, self._reader(model, cache, model_kwargs), stopping_criteria, pad or 0):
            pieces.append(new)
            if self.streamer is not None:
                for column in new.unbind(1):
                    self.streamer.put(column.cpu())
        if self.streamer is not None:
            self.streamer.end()
        sequences = torch.cat([pieces[0], *(piece.to(input_ids.device) for piece in pieces[1:])], 1)
        if generation_config.return_dict_in_generate:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return sequences

    @torch.no_grad()
    def steps(
        self,
        model: Any,
        input_ids: Tensor,
        cache: Any,
        max_new_tokens: int,
        *,
        call: Any = None,
        eos: Sequence[int] = (),
        process: Callable[[Tensor, Tensor], Tensor] | None = None,
        samples: bool = False,
    ) -> Iterator[Tensor]:
        """The new tokens of each step, ``(batch, tokens)``, at least one, in the CPU's memory: a loop without ``generate``.

        Args:
            model: a causal model of transformers.
            input_ids: prompts of one length, ``(batch, tokens)``.
            cache: empty, or holding the beginning of the prompts.
            call: the compiled model, if ``model`` itself is not compiled in place.
            eos: tokens at which a text ends; it is padded with the first of them.
            process: changes logits, as in :class:`~accelpass.decoding.Request`.
        """
        longest = input_ids.shape[1] + max_new_tokens
        request = Request(model, input_ids, None, None, longest, process, samples, self.generator)
        ends = torch.tensor(list(eos))

        def stops(ids: Tensor, scores: None) -> Tensor:
            return torch.isin(ids[:, -1], ends) | (ids.shape[1] >= longest)

        yield from self._run(
            request, self._reader(model, cache, {"use_cache": True}, call), stops, eos[0] if eos else 0
        )

    @torch.no_grad()
    def prepare(self, model: Any, cache: Any, call: Any = None) -> None:
        """Compile the calls of all sizes before the first request, with an empty cache like that of the requests; it is emptied again.

        Prompts' graphs are compiled as well, for prompts of any length: a second length lets Dynamo ask for no length.
        """
        batch = max(1, getattr(cache.layers[0], "batch_size", 1) // (1 if self.guidance is None else 2))
        room = getattr(cache.layers[0], "capacity", None) or 64
        for number, size in enumerate(self.sizes):
            # More rows than a step's, where the cache has room for them.
            length = max(2, min(24, room - 16 - size)) + number
            ids = torch.zeros((batch, length), dtype=torch.int64, device=model.device)
            reader = self._reader(model, cache, {"use_cache": True}, call)
            if isinstance(reader, GuidedReader):
                reader.guidance = replace(reader.guidance, without=torch.clone)  # a prompt of any length will do
            # Texts as long as the cache: a draft's own has the size that it has in requests.
            longest = max(room - 1, length + size)
            request = Request(model, ids, None, None, longest, generator=self.generator)
            whole = None if self.one_graph is None else Step(request, reader, self.one_graph, self._steps)
            reader.first(ids)
            request = _with_cache(request, reader)
            drafter = self.proposer.start(request)
            text = [[0] * (ids.shape[1] + drafter.behind)] * len(ids)
            proposal = drafter.propose(text, size - 1) if size > 1 else None
            proposal = Proposal(ids[:, :1]) if proposal is None else proposal
            tree = None if proposal.tree is None or proposal.count + 1 != size else proposal.tree
            read = torch.zeros((len(ids), size), dtype=torch.int64, device=model.device)
            if whole is None:
                reader.read(read, tree)
            else:
                whole(read, Proposal(read[:, 1:], tree=tree), ids)
            cache.reset()

    def _reader(self, model: Any, cache: Any, kwargs: dict[str, Any], call: Any = None) -> Reader:
        guidance = self.guidance
        reader = (
            Reader(model, cache, kwargs, call)
            if guidance is None
            else GuidedReader(model, cache, kwargs, guidance, call)
        )
        reader.asks_hidden = self.proposer.needs_hidden
        return reader

    def _run(self, request: Request, reader: Reader, stops: Any, pad: int) -> Iterator[Tensor]:
        _refuse_both_directions(request.model)
        text = _Text(request, pad)
        paces, self.statistics = self._paces.setdefault(request.model, {}), Statistics()
        pace = paces.setdefault(request.batch, Pace(self.sizes, self.adaptive))
        whole = None if self.one_graph is None else Step(request, reader, self.one_graph, self._steps)
        logits = reader.first(request.ids)
        request = _with_cache(request, reader)
        drafter = self.proposer.start(request)
        proposal, size, started = self._guided(drafter, text, 1), 1, 0.0  # the prompt's own call is not counted
        read = request.ids[:, -1:]
        verified = self.acceptance(read, text.processed(read, logits, proposal), proposal, request)
        while True:
            verified = verified if reader.hidden is None else replace(verified, hidden=reader.hidden)
            new, rows, accepted = text.add(verified, stops)
            reader.keep(text.length - 1, None if rows is None else rows[: new.shape[1]])
            if started:
                pace.note(size, new.shape[1], time.perf_counter() - started)
                self.statistics.note(read.shape[1], new.shape[1])
            yield new
            if text.is_done:
                return
            started = time.perf_counter()
            drafter.observe(verified, accepted)
            # A chain's guesses beyond the longest text are for nothing; a tree has many of the same position.
            room = _room(reader)
            sizes = pace.allowed(room if drafter.branches else min(request.max_length - text.length, room))
            proposal = self._guided(drafter, text, max(sizes, default=1))
            size = 1 if not proposal.count else max(sizes)  # a tree has as many rows as it has, of those it was given
            if proposal.tree is None and proposal.count:
                size = next((some for some in sizes if some > proposal.count), size)
                proposal = _filled(proposal, size - 1)
            read = torch.cat([text.last(), proposal.tokens], 1)
            if whole is not None:
                verified = whole(read, proposal, text.ids[:, : text.length - 1])
                continue
            logits = reader.read(read, proposal.tree)
            verified = self.acceptance(read, text.processed(read, logits, proposal), proposal, request)

    def _guided(self, drafter: Drafter, text: _Text, size: int) -> Proposal:
        if size == 1 and not drafter.guides:
            return Proposal.nothing(text.ids)
        found = drafter.propose(text.host, size - 1)
        if found is None:
            return Proposal.nothing(text.ids)
        if found.tree is not None and found.count > size - 1:
            raise DecodingError(
                f"{type(drafter).__name__} proposed a tree of {found.count} guesses where a call has room for {size - 1}: give the decoder a "
                f"size of {found.count + 1}, or propose fewer; a tree cannot be cut by others, as it may lose a parent"
            )
        return found


class _Text:
    """The texts of a batch on the device and on the host, and which of them have ended."""

    def __init__(self, request: Request, pad: int) -> None:
        self.request, self.pad = request, pad
        batch, self.length = request.ids.shape
        self.ids = request.ids.new_full((batch, max(request.max_length, self.length) + 1), pad)
        self.ids[:, : self.length] = request.ids
        self.host: list[list[int]] = request.ids.tolist()
        self.copy = self.ids.cpu()  # the same tensor, where it is there already
        self.live = [True] * batch

    @property
    def is_done(self) -> bool:
        return not any(self.live)

    def last(self) -> Tensor:
        return self.ids[:, self.length - 1 : self.length]

    def processed(self, read: Tensor, logits: Tensor, proposal: Proposal) -> Tensor:
        """Logits as the processors leave them, of each row with the text and the guesses before it."""
        process = self.request.process
        if process is None:
            return logits
        made = []
        text = self.ids[:, : self.length - 1]
        for row in range(read.shape[1]):
            if proposal.tree is None:
                own = read[:, : row + 1]
            else:
                depth = int(proposal.tree.depths[row])
                own = read[:, proposal.tree.paths[row, : depth + 1].to(read.device)]
            made.append(process(torch.cat([text, own], 1), logits[:, row].clone()))
        return torch.stack(made, 1)

    def add(self, verified: Verified, stops: Any) -> tuple[Tensor, list[int] | None, int]:
        """Append what was accepted, token for token until all texts have ended: the new tokens, rows that they follow, guesses."""
        parts = [verified.counts[:, None], verified.tokens, *([] if verified.rows is None else [verified.rows])]
        all_of_it = torch.cat(parts, 1) if verified.found is None else verified.found
        found = all_of_it.tolist()  # the step's one read from the device
        width = verified.tokens.shape[1]
        accepted = min(line[0] for line, live in zip(found, self.live, strict=True) if live)
        start = self.length
        for number in range(accepted + 1):
            column = [line[1 + number] if live else self.pad for line, live in zip(found, self.live, strict=True)]
            for line, token in zip(self.host, column, strict=True):
                line.append(token)
            self.copy[:, self.length] = torch.tensor(column)
            self.length += 1
            if stops is not None:
                ended = stops(self.copy[:, : self.length], None)
                self.live = [
                    live and not end for live, end in zip(self.live, ended.expand(len(self.live)).tolist(), strict=True)
                ]
            if self.is_done:
                break
        new = self.copy[:, start : self.length]
        if self.copy is not self.ids:
            self.ids[:, start : self.length] = new.to(self.ids.device)
        rows = None if verified.rows is None else found[0][1 + width : 2 + width + accepted]
        return new.clone(), rows, accepted


def _filled(proposal: Proposal, count: int) -> Proposal:
    """A chain of just ``count`` guesses. What is missing is the last token again: any guess is as good, and may be right."""
    if proposal.count >= count:
        return proposal.cut(count)
    missing = count - proposal.count
    tokens = torch.cat([proposal.tokens, proposal.tokens[:, -1:].expand(-1, missing)], 1)
    probs = proposal.probs
    if probs is not None:  # a guess that was not drawn has all the probability
        sure = torch.nn.functional.one_hot(tokens[:, -missing:], probs.shape[-1]).to(probs.dtype)
        probs = torch.cat([probs, sure], 1)
    return Proposal(tokens, probs)


def _room(reader: Reader) -> int:
    """Tokens that the cache still takes."""
    most = getattr(reader.cache, "capacity", None)
    return 1 << 30 if most is None else most - reader.held


def _with_cache(request: Request, reader: Reader) -> Request:
    """What the cache can do, which shows when it holds a prompt."""
    trees = request.batch == 1 and takes_trees(request.model, reader.cache)
    return replace(request, trees=trees, capacity=getattr(reader.cache, "capacity", 0))


def _refuse_both_directions(model: Any) -> None:
    """Raises :class:`DecodingError` for a model whose earlier tokens see later ones: guesses would change what is read before them."""
    causal = getattr(model.config.get_text_config(decoder=True), "is_causal", True)
    if causal is False or not hasattr(model, "prepare_inputs_for_generation"):
        raise DecodingError(
            f"{type(model).__name__} is no causal decoder: it reads a text in both directions, and guesses verified in one call would change "
            "what is before them. For masked-diffusion language models use accelpass.decoding.dparallel"
        )


_REMEMBERING = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def _refuse(model: Any, config: Any, synced_gpus: bool, kwargs: dict[str, Any], processors: Any) -> None:
    """Raises :class:`DecodingError` for what guesses cannot be verified in."""
    cache = kwargs.get("past_key_values")
    why = ""
    if config.num_beams > 1:
        why = f"num_beams={config.num_beams}: a beam search goes on with several texts at once and reorders them; use num_beams=1"
    elif model.config.is_encoder_decoder:
        why = f"{type(model).__name__} has an encoder; decoders alone are decoded several tokens at a time"
    elif kwargs.get("inputs_embeds") is not None:
        why = "inputs_embeds: guesses follow from token ids; give input_ids"
    elif synced_gpus:
        why = "synced_gpus: texts on several devices do not accept equally many guesses"
    elif cache is None or not kwargs.get("use_cache", True):
        why = "use_cache=False: without a cache, a step of several tokens reads the whole text"
    elif any(
        getattr(config, name)
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    ):
        why = (
            "output_scores, output_logits, output_attentions and output_hidden_states are not collected; leave them out"
        )
    else:
        found = [type(p).__name__ for p in processors or () if type(p).__name__ in _REMEMBERING]
        if found:
            why = (
                f"{found[0]} remembers the tokens that it was called for, and guesses would be among them; leave it out"
            )
    if why:
        raise DecodingError(why)
