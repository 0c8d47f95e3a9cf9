"""How many questions about short videos of digits are answered right when frames are reused, left out, merged, or kept in few bits.

    python -m benchmarks.video_quality                      # 64 videos, 512 questions
    python -m benchmarks.video_quality --videos 8           # does it work?
    python -m benchmarks.video_quality --write benchmarks/results/video_quality.json

The model is ``models_zoo.videos``, videos are of specimens that it has not seen. A video is read first; the words of the question come
one by one and read it from the cache, so that what a cache rounds counts. Rows are printed as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import accelpass
from accelpass.models_zoo.canvases.questions import IMAGE, PATCHES, Asked, Processor
from accelpass.models_zoo.videos.model import load
from accelpass.models_zoo.videos.questions import ASKED, FRAMES, frames, ids_of, prompt_of, videos
from accelpass.passes.visual_tokens.frames.d_code import chosen_frames, merged_tokens
from benchmarks.visual_quality import command, flops_of_dense

SPAN = (1, len(prompt_of("", dict.fromkeys(range(FRAMES), PATCHES))))
CANDIDATES: dict[str, list[Any]] = {
    "dense": [],
    **{f"stc, {keep:.0%} read": [{"name": "stc", "keep": keep, "interval": 1}] for keep in (0.5, 0.306, 0.15)},
    **{f"stc, {share:.0%} updated": [{"name": "stc", "keep": 1.0, "update": share}] for share in (0.5, 0.25)},
    "stc, the paper's": ["stc"],
    "vidkv, 2 and 2 bits": [{"name": "vidkv", "bits": 2, "value_bits": 2, "span": SPAN}],
    "vidkv, 2 and 1.58 bits": [{"name": "vidkv", "bits": 2, "span": SPAN}],
    "vidkv, the paper's": [{"name": "vidkv", "span": SPAN, "protect": 0.2}],
}
MERGED: dict[str, dict[str, Any]] = {
    "d_code, 6 frames, 0.9": {"count": FRAMES, "threshold": 0.9},
    "d_code, 6 frames, 0.8": {"count": FRAMES},
    "d_code, 4 frames, 0.8": {"count": 4},
}
"""What is read of a video; these run on the host, in front of the language model."""
_BATCH = 16


@torch.no_grad()
def answers(fast: Any, model: Any, processor: Processor, asked: Asked, title: str) -> Tensor:
    """Whether each question was answered right, ``(videos, questions)``."""
    right = []
    cache = accelpass.KVCache(model, capacity=256, batch_size=_BATCH)
    for start in track(range(0, len(asked.canvases), _BATCH), description=title):
        some = slice(start, start + _BATCH)
        given = processor(images=asked.canvases[some], text=[""] * _BATCH)
        said = []
        for number in range(ASKED):
            cache.reset()
            fast(**given, past_key_values=cache, logits_to_keep=1)
            words = torch.tensor([ids_of(row[number]) for row in asked.questions[some]])
            seen = given["attention_mask"]
            for word in words.split(1, 1):
                seen = torch.cat([seen, torch.ones_like(word)], 1)
                made = fast(input_ids=word, attention_mask=seen, past_key_values=cache, logits_to_keep=1)
            said.append(made.logits[:, -1].argmax(-1))
        right.append(torch.stack(said, 1) == _wanted(asked, some))
    return torch.cat(right)


def _wanted(asked: Asked, some: slice) -> Tensor:
    return torch.tensor([[ids_of(answer)[0] for answer in row] for row in asked.answers[some]])


@torch.no_grad()
def merged_answers(model: Any, asked: Asked, options: dict[str, Any]) -> tuple[Tensor, float]:
    """Whether each question was answered right, and which share of the visual tokens was read."""
    right, read = [], 0
    kept = {"threshold": options.get("threshold", 0.8)}
    for number, video in enumerate(asked.canvases):
        seen = model.model.vision_tower(frames(video[None]), output_hidden_states=True)
        features = model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        chosen = chosen_frames(seen.pooler_output, options["count"])
        tokens = {frame: merged_tokens(features[frame], PATCHES, **kept) for frame in chosen}
        read += sum(map(len, tokens.values()))
        said = []
        for question in asked.questions[number]:
            ids = torch.tensor([prompt_of(question, {frame: len(t) for frame, t in tokens.items()})])
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter((ids == IMAGE).unsqueeze(-1), torch.cat(list(tokens.values())))
            said.append(model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
        right.append(torch.stack(said) == _wanted(asked, slice(number, number + 1))[0])
    return torch.stack(right), read / (len(right) * FRAMES * PATCHES)


def _row(name: str, right: Tensor) -> dict[str, Any]:
    share = lambda some: round(some.float().mean().item(), 4)  # noqa: E731
    return {
        "candidate": name,
        "which": share(right[:, :FRAMES]),
        "how_many": share(right[:, FRAMES:]),
        "all": share(right),
    }


def measure(count: int, names: list[str]) -> list[dict[str, Any]]:
    asked = videos(max(1, count // _BATCH) * _BATCH, True, torch.Generator().manual_seed(7))
    rows = []
    for name in names:
        torch._dynamo.reset()
        model, processor = load(torch.float32)
        if name in MERGED:
            right, read = merged_answers(model, asked, MERGED[name])
            row = {**_row(name, right), "visual_tokens_read": round(read, 3)}
        else:
            accelpass.one_graph(model)
            fast = torch.compile(model, backend="accelpass", options={"passes": CANDIDATES[name], "lowering": "eager"})
            row = _row(name, answers(fast, model, processor, asked, name))
            row["flops"], passes = flops_of_dense(fast), accelpass.explain(fast).passes
            row["took"] = {each: sorted({d.what for d in done.took.values()}) for each, done in passes.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """The number of videos is a multiple of the batch's."""
    command(__doc__, "videos", 64, [*CANDIDATES, *MERGED], measure, FRAMES * PATCHES, ASKED)


if __name__ == "__main__":
    main()
