"""Generating with a package: the prompt's graph once, then the graph of one token, on state that each answer has for itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.package.errors import PackageError
from accelpass.backends.package.file.manifest import Decoder, Manifest, Size
from accelpass.backends.package.library import Library, started
from accelpass.backends.package.sampling import Sampling


class Session:
    """The state of one answer, or of a batch of them: keys and values, in whatever form the passes keep them.

    Attributes:
        tokens: of each sequence so far.
    """

    def __init__(self, package: PackagedDecoder) -> None:
        self._package = package
        self._states = package._states()
        self.tokens = 0

    def prompt(self, ids: Tensor) -> Tensor:
        """Read a prompt ``(batch, tokens)``; the logits of the token after it, ``(batch, vocabulary)``.

        Raises:
            PackageError: it does not fit, or the session has begun already.
        """
        if self.tokens:
            raise PackageError(f"this session holds {self.tokens} tokens; begin another: package.session()")
        package, length = self._package, ids.shape[-1]
        package.check(ids, 1)
        first = package.graphs["prompt"].graph.inputs[0].shape[-1]
        least = first.least if isinstance(first, Size) else first
        if length < least and package.about.keeps_all:
            return self._run("decode", ids)  # over nothing that is stored yet
        return self._run("prompt", ids)

    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of each sequence, ``(batch,)``; the logits of the next, ``(batch, vocabulary)``.

        Raises:
            PackageError: there is no room.
        """
        about = self._package.about
        if self.tokens + 1 > about.capacity:
            raise PackageError(
                f"the package has room for {about.capacity} tokens, and they are used; package the model with cache="
                f"{about.capacity * 2}"
            )
        return self._run("decode", ids[:, None])

    def close(self) -> None:
        """Give the state's memory to the next session."""
        if self._states:
            self._package._free.append(self._states)
            self._states = []

    def _run(self, graph: str, ids: Tensor) -> Tensor:
        self._package.check_ids(ids)
        library, rows, batch = self._package.graphs[graph], ids.shape[0], self._package.about.batch
        if not self._states:
            raise PackageError("this session is closed; begin another: package.session()")
        if rows < batch:  # what is left of the batch repeats the last
            ids = torch.cat([ids, ids[-1:].expand(batch - rows, -1)])
        made = library([ids], self._states)
        self.tokens += ids.shape[1]
        logits = made[library.graph.outputs.index(self._package.about.logits)]
        return logits[:rows, -1]


class PackagedDecoder:
    """A language model in a package; :meth:`generate` takes what ``model.generate`` takes for one, and several threads may call it.

    Attributes:
        manifest: what the package says of itself.
        about: room, batch, tokens that end an answer.
    """

    def __init__(self, manifest: Manifest, graphs: Mapping[str, Library], tokenizer: str | None = None) -> None:
        assert manifest.decoder is not None
        self._tokenizer = tokenizer
        self.manifest = manifest
        self.about: Decoder = manifest.decoder
        self.graphs = dict(graphs)
        self._free: deque[list[Tensor]] = deque(maxlen=16)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was packaged, a ``tokenizers.Tokenizer``: ``encode(text).ids``, ``decode(ids)``.

        Raises:
            PackageError: none was packaged, or the tokenizers package is not installed.
        """
        if self._tokenizer is None:
            raise PackageError("the package has no tokenizer; package the model with tokenizer=")
        try:
            from tokenizers import Tokenizer
        except ImportError as cause:
            raise PackageError("reading the tokenizer needs tokenizers; type: pip install tokenizers") from cause
        return Tokenizer.from_str(self._tokenizer)

    def session(self) -> Session:
        """State for one answer, for a loop of one's own."""
        return Session(self)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        streamer: Any = None,
    ) -> Tensor:
        """Prompts and their answers, ``(batch, tokens)``; sequences that end early go on with the padding token.

        Args:
            input_ids: int64 ``(batch, tokens)``, all of one length.
            max_new_tokens: None for as many as there is room for.
            eos_token_id: tokens that end an answer; None for the model's own, an empty list for none.
            seed: of the draws; None draws from torch's own generator.
            streamer: as transformers has them: ``put(tokens)`` gets the prompt, then each token; ``end()`` at the end.

        Raises:
            PackageError: a prompt, batch or number of tokens that was not compiled for.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        made = [input_ids]
        if streamer is not None:
            streamer.put(input_ids)
        for tokens in self._tokens(input_ids, max_new_tokens, sampling, eos_token_id, seed):
            made.append(tokens[:, None])
            if streamer is not None:
                streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat(made, 1)

    def stream(self, input_ids: Tensor, max_new_tokens: int | None = None, **settings: Any) -> Iterator[Tensor]:
        """The tokens of an answer as they are made, each ``(batch,)``; settings are those of :meth:`generate`."""
        eos, seed = settings.pop("eos_token_id", None), settings.pop("seed", None)
        return self._tokens(input_ids, max_new_tokens, Sampling(**settings), eos, seed)

    def check(self, ids: Tensor, new: int) -> None:
        """Raise :class:`PackageError` for prompts that the package has no room for, with ``new`` tokens after them."""
        about = self.about
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise PackageError(
                f"input_ids is {str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}; a package takes int64 (batch, tokens), "
                "at least one of each"
            )
        rows, length = ids.shape
        if rows > about.batch:
            raise PackageError(
                f"{rows} prompts; the package was compiled for {about.batch} at once: give fewer, or package the model with an "
                f"example of {rows} rows"
            )
        if length > about.capacity:
            raise PackageError(
                f"a prompt of {length} tokens does not fit into a package for {about.capacity}; package the model with "
                f"cache={length + new} or more"
            )
        # The last token is made and not read again.
        if new < 1 or length + new - 1 > about.capacity:
            raise PackageError(
                f"max_new_tokens={new} after {length}: there is room for {about.capacity} tokens in all; at most "
                f"{about.capacity - length + 1} here, or package the model with cache={length + new}"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise :class:`PackageError` for a token that the model has no row for: compiled code would end the process."""
        most = self.about.vocabulary
        low, high = (int(number) for number in ids.aminmax())
        if low < 0 or (most is not None and high >= most):
            raise PackageError(f"token {low if low < 0 else high}; the model knows 0 to {(most or high + 1) - 1}")

    def _tokens(
        self, ids: Tensor, new: int | None, sampling: Sampling, eos: int | Sequence[int] | None, seed: int | None
    ) -> Iterator[Tensor]:
        room = self.about.capacity - ids.shape[-1] + 1 if new is None else new
        self.check(ids, max(room, 1) if new is None else room)
        ends = self.about.eos if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = self.about.pad if self.about.pad is not None else ends[0] if ends else 0
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self._loop(ids, room, sampling, torch.tensor(ends, dtype=torch.int64), pad, generator)

    def _loop(
        self, ids: Tensor, room: int, sampling: Sampling, ends: Tensor, pad: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        session = self.session()
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        try:
            logits = session.prompt(ids)
            for number in range(room):
                tokens = sampling.choose(logits, generator).masked_fill(done, pad)
                done |= torch.isin(tokens, ends)
                yield tokens
                if number + 1 == room or bool(done.all()):
                    return
                logits = session.step(tokens)
        finally:
            session.close()

    def _states(self) -> list[Tensor]:
        try:
            held = self._free.pop()
        except IndexError:
            return [started(s.dtype, s.shape, s.fill) for s in self.manifest.states]
        for tensor, state in zip(held, self.manifest.states, strict=True):
            tensor.fill_(state.fill)
        return held

    def __repr__(self) -> str:
        names = ", ".join(p["name"] for p in self.manifest.passes) or "no pass"
        return f"PackagedDecoder({names}; {self.about.capacity} tokens, batch {self.about.batch})"
