"""Whether several tokens a step give SmolLM2's own text: twenty pieces of prose, 256 tokens read and 256 generated, over four caches.

    python -m benchmarks.decoding_exactness                  # half an hour; rows that are there are not measured again
    python -m benchmarks.decoding_exactness --only mikv      # caches whose names contain it, anew

Weights are int8, compiled by Inductor; steps always guess (``adaptive=False``). A row counts texts that are token for token those of
single steps. Sums of several rows are added in another order than those of one, so two tokens that are equally likely but for
rounding may change places: for a text that differs, ``gap`` is how far apart the logits of both tokens are there by single steps, over
the spread of all logits of that step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass import KVCache, decoding
from accelpass.models_zoo import smollm2
from benchmarks.kv_tasks import prose
from benchmarks.machine import cpu

RESULT = Path(__file__).parent / "results" / "smollm2_decoding_exactness.json"
CACHES: dict[str, list[Any]] = {
    "dense": [],
    "h2o": [{"name": "h2o", "tokens": 160}],
    "mikv": ["mikv"],
    "kv_quant": ["kv_quant"],
}
Row = dict[str, Any]


def decoders() -> dict[str, Any]:
    return {
        "prompt_lookup": decoding.prompt_lookup(adaptive=False),
        "token_recycling": decoding.token_recycling(7, adaptive=False),
    }


def single(model: Any, ids: Tensor, cache: KVCache, new: int) -> tuple[Tensor, Tensor]:
    """The text of single steps, and the logits of each, ``(new, vocabulary)``."""
    cache.reset()
    made = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences[0], torch.cat(made.logits)


def compared(text: Tensor, plain: Tensor, logits: Tensor, prompt: int) -> dict[str, float] | None:
    """Where two texts part, and how close the two tokens were; None if they are the same."""
    length = min(len(text), len(plain))
    apart = (text[:length] != plain[:length]).nonzero()
    if len(text) == len(plain) and not len(apart):
        return None
    at = int(apart[0]) if len(apart) else length
    if at >= length:
        return {"at": at - prompt, "gap": float("nan")}
    row = logits[at - prompt]
    return {"at": at - prompt, "gap": float((row[plain[at]] - row[text[at]]) / row.std())}


def measure(name: str, texts: list[Tensor], new: int) -> list[Row]:
    torch._dynamo.reset()
    model, _ = smollm2.load(torch.float32)
    model.compile(backend="accelpass", options={"passes": ["int8_weights", *CACHES[name]]})
    # A cache that has served guesses goes on recording what could be taken back; plain decoding is that of one that has not.
    alone, cache = (KVCache(model, texts[0].shape[1] + new + 16) for _ in range(2))
    ways = decoders()
    rows: dict[str, Row] = {way: {"cache": name, "decoder": way, "same": 0, "of": 0, "apart": []} for way in ways}
    for number, ids in enumerate(texts):
        plain, logits = single(model, ids, alone, new)
        for way, decoder in ways.items():
            cache.reset()
            text = model.generate(
                ids, past_key_values=cache, max_new_tokens=new, do_sample=False, custom_generate=decoder
            )
            found = compared(text[0], plain, logits, ids.shape[1])
            rows[way]["of"] += 1
            rows[way]["same"] += found is None
            rows[way]["apart"] += [] if found is None else [{"text": number, **found}]
            rows[way]["tokens_per_call"] = round(decoder.statistics.tokens_per_call, 2)
        print(
            f"{name} {number}: " + ", ".join(f"{w} {row['same']} of {row['of']}" for w, row in rows.items()), flush=True
        )
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="that are read, and generated")
    parser.add_argument("--only", help="caches whose names contain it, anew")
    asked = parser.parse_args()
    _, tokenizer = smollm2.load(torch.float32)
    ids = tokenizer(prose(), return_tensors="pt").input_ids
    apart = ids.shape[1] // asked.texts
    texts = [ids[:, i * apart : i * apart + asked.tokens] for i in range(asked.texts)]
    settings = {"texts": asked.texts, "tokens": asked.tokens, "torch": str(torch.__version__)}
    before = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    rows: list[Row] = before["rows"] if before.items() >= settings.items() else []
    for name in CACHES:
        there = any(row["cache"] == name for row in rows)
        if there if asked.only is None else asked.only not in name:
            continue
        rows = [row for row in rows if row["cache"] != name] + measure(name, texts, asked.tokens)
        RESULT.write_text(json.dumps({**settings, "cpu": cpu(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
