"""How many questions about canvases of digits are answered right when the language model reads fewer visual tokens.

    python -m benchmarks.visual_quality                      # 200 canvases, 1,200 questions
    python -m benchmarks.visual_quality --canvases 20        # does it work?
    python -m benchmarks.visual_quality --write benchmarks/results/visual_quality.json

The model is ``models_zoo.canvases``, a LLaVA that was trained here; canvases are of specimens that it has not seen. The dense model
answers the same questions. Rows are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import accelpass
from accelpass.models_zoo.canvases.model import load
from accelpass.models_zoo.canvases.questions import ASKED, PATCHES, TILES, Asked, Processor, canvases, ids_of

TILED = {"rows": 2, "columns": 2}
CANDIDATES: dict[str, list[Any]] = {
    "dense": [],
    **{f"visionzip, {keep:.0%}": [{"name": "visionzip", "keep": keep}] for keep in (0.5, 0.2, 0.11)},
    **{f"hired, {keep:.0%}": [{"name": "hired", "keep": keep, **TILED}] for keep in (0.5, 0.2)},
    **{f"hired, {keep:.0%}, each tile alone": [{"name": "hired", "keep": keep}] for keep in (0.5, 0.2)},
    **{f"fastv, {keep:.0%}": [{"name": "fastv", "keep": keep}] for keep in (0.5, 0.2)},
    **{f"tome, {merge}": [{"name": "tome", "merge": merge}] for merge in (2, 4, 6)},
}
"""``tome`` merges in the tower alone: the language model reads all tokens."""
_BATCH = 8


@torch.no_grad()
def answers(fast: Any, model: Any, processor: Processor, asked: Asked, title: str) -> torch.Tensor:
    """Whether each question was answered right, ``(canvases, questions)``."""
    right = []
    cache = accelpass.KVCache(model, capacity=256, batch_size=_BATCH * ASKED)
    for start in track(range(0, len(asked.canvases), _BATCH), description=title):
        some = slice(start, start + _BATCH)
        texts = [question for row in asked.questions[some] for question in row]
        images = asked.canvases[some].repeat_interleave(ASKED, 0)
        given = processor(images=images, text=texts)
        cache.reset()
        said = fast(**given, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        wanted = torch.tensor([ids_of(answer)[0] for row in asked.answers[some] for answer in row])
        right.append((said == wanted).view(-1, ASKED))
    return torch.cat(right)


def flops_of_dense(fast: Any) -> float | None:
    """Of the compiled model, in shares of the dense one's."""
    counted = accelpass.explain(fast).flops
    return None if counted is None else round(counted[1] / counted[0], 3)


def measure(count: int, names: list[str]) -> list[dict[str, Any]]:
    asked = canvases(count // _BATCH * _BATCH, True, torch.Generator().manual_seed(7))
    rows = []
    for name in names:
        torch._dynamo.reset()
        model, processor = load(torch.float32)
        accelpass.one_graph(model)
        options = {"passes": CANDIDATES[name], "lowering": "eager"}
        fast = torch.compile(model, backend="accelpass", options=options)
        right = answers(fast, model, processor, asked, name)
        row = {
            "candidate": name,
            "where": round(right[:, :4].float().mean().item(), 4),
            "how_many": round(right[:, 4:].float().mean().item(), 4),
            "all": round(right.float().mean().item(), 4),
            "flops": flops_of_dense(fast),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def command(
    about: str,
    what: str,
    count: int,
    known: Iterable[str],
    measure: Callable[[int, list[str]], list[Any]],
    tokens: int,
    asked: int,
) -> None:
    """What is typed: how many canvases (or videos), which candidates, and where the rows go.

    Args:
        tokens: visual tokens of a text; asked: questions of a canvas.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{what}", type=int, default=count, dest="count")
    parser.add_argument("--only", default="", help="candidates that contain one of these words, with commas")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    words = [w for w in given.only.split(",") if w]
    rows = measure(given.count, [n for n in known if not words or any(w in n for w in words)])
    if given.write:
        made = {"visual_tokens": tokens, "questions": given.count * asked, "rows": rows}
        given.write.write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    command(__doc__, "canvases", 200, CANDIDATES, measure, TILES * PATCHES, ASKED)


if __name__ == "__main__":
    main()
