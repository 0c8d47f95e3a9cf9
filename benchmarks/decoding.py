"""SmolLM2-135M with int8 weights: several tokens a step, on chat, summaries and code edits.

``python -m benchmarks.decoding`` writes benchmarks/results/smollm2_decoding_cpu.json. Ways take turns on each prompt, in one process
and through one compiled model, whose graphs are made before; the first turn is not counted. Prompts are made of texts that packages ship.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from accelpass import KVCache, decoding
from accelpass.models_zoo import smollm2
from benchmarks.kv_tasks import prose
from benchmarks.machine import cpu, put_table, row_lines

RESULT = Path(__file__).parent / "results" / "smollm2_decoding_cpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "decoding.md"
START, END = "<!-- decoding speeds -->\n", "<!-- end of decoding speeds -->"
PLAIN, PEER = "plain", "transformers' prompt lookup"
QUESTIONS = (
    "Explain in three paragraphs why the sky is blue.",
    "Give me a recipe for pancakes, with a list of ingredients and numbered steps.",
    "Write a short story about a lighthouse keeper who finds a letter.",
)


def ways() -> dict[str, dict[str, Any]]:
    """What ``generate`` is given, by name; each decoder lives for all prompts, as a server's would."""
    made = {
        "prompt_lookup": decoding.prompt_lookup(),
        "token_recycling, 7 guesses": decoding.token_recycling(7),
        "jacobi": decoding.jacobi(4),
        "self_draft, 12 of 30 layers left out": decoding.self_draft(range(9, 21), ["int8_weights"]),
    }
    return {PLAIN: {}, PEER: {"prompt_lookup_num_tokens": 7}} | {
        name: {"custom_generate": decoder} for name, decoder in made.items()
    }


def prompts(count: int) -> dict[str, list[str]]:
    """Prompts of each kind: questions, summaries of prose, and edits of a module of Python's library."""
    text, code = prose(), Path(json.__file__).with_name("scanner.py").read_text()
    apart = len(text) // count
    parts = [text[i * apart : i * apart + 2400] for i in range(count)]
    lines = code.splitlines()
    pieces = ["\n".join(lines[i * 12 : i * 12 + 36]) for i in range(count)]
    return {
        "chat": list(QUESTIONS[:count]),
        "summary": [f"Summarise this text, and quote its main sentences:\n\n{part}" for part in parts],
        "code": [f"Repeat this code, with the name `string` changed to `text`:\n\n{piece}" for piece in pieces],
    }


class Clock:
    """Stops nothing; notes when the first new token has come."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)


def timed(model: Any, ids: Tensor, cache: KVCache, new: int, how: dict[str, Any]) -> tuple[Tensor, float]:
    """The text, and the seconds that its tokens after the first took."""
    cache.reset()
    clock = Clock()
    text = model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]), **how,
    )  # fmt: skip
    return text, time.perf_counter() - clock.first


def measure(
    kinds: dict[str, list[str]], new: int, turns: int, only: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    model, tokenizer = smollm2.load(torch.float32)
    model.compile(backend="accelpass", options={"passes": ["int8_weights"]})
    given = {name: how for name, how in ways().items() if name == PLAIN or fnmatch.fnmatchcase(name, only)}
    rows = []
    encoded = {
        kind: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            for text in texts
        ]
        for kind, texts in kinds.items()
    }
    longest = max(ids.shape[1] for some in encoded.values() for ids in some)
    cache = KVCache(model, longest + new + 8)
    for how in given.values():
        if "custom_generate" in how:
            how["custom_generate"].prepare(model, cache)
    say("compiled; from here on the machine must be quiet")
    for kind, texts in encoded.items():
        for number, ids in enumerate(texts):
            seconds: dict[str, list[float]] = {name: [] for name in given}
            calls, same, plain, count = {}, {}, None, 0
            for turn in range(turns + 1):
                for name, how in given.items():
                    text, took = timed(model, ids, cache, new, how)
                    plain = text if plain is None else plain
                    count, same[name] = plain.shape[1] - ids.shape[1], torch.equal(text, plain)
                    decoder = how.get("custom_generate")
                    if decoder is not None:
                        calls[name] = round(decoder.statistics.tokens_per_call, 2)
                    if turn:
                        seconds[name].append(took)
            medians = {name: statistics.median(some) for name, some in seconds.items()}
            for name, median in medians.items():
                rows.append(
                    {
                        "kind": kind,
                        "prompt": number,
                        "tokens": count,
                        "name": name,
                        "tokens_per_call": calls.get(name, ""),
                        "tokens_per_second": round((count - 1) / median, 1),
                        "against_plain": round(medians[PLAIN] / median, 2),
                        "same_text": same[name],
                    }
                )
            say(f"{kind} {number}: " + ", ".join(f"{name} {medians[PLAIN] / m:.2f}x" for name, m in medians.items()))
    return rows


def write_table(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page: of each way and kind of prompt, how fast each prompt was by plain decoding."""
    rows = content["rows"]
    kinds, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "name"))
    made = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        calls = [row["tokens_per_call"] for row in own if row["tokens_per_call"] != ""]
        by_kind = {kind: ", ".join(str(row["against_plain"]) for row in own if row["kind"] == kind) for kind in kinds}
        several = f"{min(calls)} to {max(calls)}" if calls else ""
        made.append({"name": name, **by_kind, "tokens_a_call": several})
    put_table(page, START, "\n".join(row_lines("way", made)), END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=3, help="of each kind")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="*", help="a shell pattern: ways to measure anew, beside plain decoding")
    parser.add_argument("--write", type=Path, default=RESULT)
    asked = parser.parse_args()
    rows = measure(prompts(asked.prompts), asked.tokens, asked.turns, asked.only, lambda line: print(line, flush=True))
    if asked.only != "*" and asked.write.is_file():
        new = {row["name"] for row in rows} - {PLAIN}
        old = [row for row in json.loads(asked.write.read_text())["rows"] if row["name"] not in new]
        rows = old + [row for row in rows if row["name"] in new]
    device = f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    asked.write.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "rows": rows}
    asked.write.write_text(json.dumps(content, indent=1) + "\n")
    if asked.write == RESULT:
        write_table(content)


if __name__ == "__main__":
    main()
