"""Greedy text generation with ONNX Runtime alone: no torch, and no accelpass.

    accelpass export smollm2-135m --passes int8_weights,h2o --cache 512 -o model.onnx
    python examples/onnx_generate.py model.json 1 2 3 --tokens 16

The files are those of ``accelpass.export_onnx`` with a KVCache. ``model.json`` names them and the state that goes from call to
call: every ``present`` output is the ``past`` input of the next step. The prompt's file starts from empty state by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Decoder:
    """The two files of a decoder, and what they remember of one text.

    Args:
        manifest: the JSON beside the files.
        options: of both sessions; None for ONNX Runtime's own.
    """

    def __init__(self, manifest: str | Path, options: Any = None) -> None:
        path = Path(manifest)
        self.about = json.loads(path.read_text())
        self.sessions = {
            kind: onnxruntime.InferenceSession(str(path.parent / name), options, providers=["CPUExecutionProvider"])
            for kind, name in self.about["files"].items()
        }
        self.past: dict[str, np.ndarray] = {}
        self.seen = 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Logits of the next token ``(batch, vocabulary)``: of a prompt ``(batch, tokens)`` first, then of a token each."""
        kind = "decode" if self.past else "prompt"
        if self.seen + ids.shape[1] > self.about["capacity"]:
            raise ValueError(
                f"{self.seen + ids.shape[1]} tokens do not fit into the capacity of {self.about['capacity']}"
            )
        session = self.sessions[kind]
        names = [output.name for output in session.get_outputs()]
        made = dict(zip(names, session.run(None, {"input_ids": ids, **self.past}), strict=True))
        self.past = {state["past"]: made[state["present"]] for state in self.about["state"]}
        self.seen += ids.shape[1]
        return made["logits"][:, -1]

    def reset(self) -> None:
        """Forget the text."""
        self.past, self.seen = {}, 0


def generate(decoder: Decoder, prompt: Sequence[int], tokens: int, end: frozenset[int] = frozenset()) -> list[int]:
    """The most likely ``tokens`` after ``prompt``; a token of ``end`` is the last."""
    decoder.reset()
    current, answer = np.asarray([list(prompt)], dtype=np.int64), list[int]()
    while len(answer) < tokens and not (answer and answer[-1] in end):
        answer.append(int(decoder(current)[0].argmax()))
        current = np.asarray([answer[-1:]], dtype=np.int64)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate tokens with ONNX Runtime.")
    parser.add_argument("manifest", help="the JSON that the export wrote")
    parser.add_argument("prompt", nargs="+", help="token numbers; or text, with --tokenizer")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--tokenizer", help="a tokenizer.json (package 'tokenizers')")
    given = parser.parse_args()
    decoder = Decoder(given.manifest)
    if given.tokenizer is None:
        print(*generate(decoder, [int(word) for word in given.prompt], given.tokens))
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(given.tokenizer)
    answer = generate(decoder, tokenizer.encode(" ".join(given.prompt)).ids, given.tokens)
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main()
