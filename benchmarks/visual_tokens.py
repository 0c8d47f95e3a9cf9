"""Time to the first token of a vision-language model that reads fewer visual tokens, time of a token after it, and peak memory.

    python -m benchmarks.visual_tokens                        # shapes of SmolVLM-256M, random weights; half an hour
    python -m benchmarks.visual_tokens --batches 1            # rows of another batch stay in the file
    python -m benchmarks.visual_tokens --batches "4 frames"   # a video of so many images
    python -m benchmarks.visual_tokens --small                # does it work? a small model, two rounds, nothing written

The tower has the shapes of SmolVLM-256M's (12 blocks of 768 channels) with a class token, and the language model is SmolLM2-135M's;
a plain projector stands between, so that an image is 576 visual tokens. With several texts a batch both have a quarter of their
layers (``LAYERS``): a call of all would take a minute, and what a layer costs is the same. Candidates take turns within one process, each compiled
before the first turn, with keys and values stored; times are medians, and ratios are of dense Inductor's, which stores them in a
``StaticCache``. What a score costs by itself is to be seen in the rows that drop 32 tokens, a number that leaves sizes even.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import accelpass
from accelpass.passes.visual_tokens.frames.d_code import video_tokens
from benchmarks.decode import own_call
from benchmarks.machine import cpu, put_table, row_lines
from benchmarks.structure import resident

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "visual_tokens_cpu.json"
PAGE = ROOT / "docs" / "visual-tokens.md"
START, END = "<!-- visual timing -->\n", "<!-- end of visual timing -->"
IMAGE, TEXT, ANSWER, SPARE = 9, 32, 8, 64
VIDEO = "4 frames"
LAYERS = {"1": (12, 30), "16": (3, 8), VIDEO: (12, 30)}
"""By batch, or frames of the one video, blocks of the tower and layers of the language model."""
INDUCTOR = "inductor"
OF_VIDEOS: dict[str, list[Any] | None] = {
    INDUCTOR: None,
    "accelpass, dense": [],
    "stc, 50 %": [{"name": "stc", "keep": 0.5}],
    "stc, 20 %": [{"name": "stc", "keep": 0.2}],
    "stc, 50 %, all frames computed": [{"name": "stc", "keep": 0.5, "interval": 1}],
    "vidkv": ["vidkv"],
    "d_code, 50 %": [],
    "d_code, 20 %": [],
}
"""D-CoDe's share is all that it keeps of each frame: it merges as many more as are alike, which random weights do not tell."""
CANDIDATES: dict[str, list[Any] | None] = {
    INDUCTOR: None,
    "accelpass, dense": [],
    "tome, 24": [{"name": "tome", "merge": 24}],
    "visionzip, 50 %": [{"name": "visionzip", "keep": 0.5}],
    "visionzip, 20 %": [{"name": "visionzip", "keep": 0.2}],
    "hired, 50 %": [{"name": "hired", "keep": 0.5}],
    "hired, 20 %": [{"name": "hired", "keep": 0.2}],
    "flowcut, 50 %": [{"name": "flowcut", "keep": 0.5}],
    "flowcut, 50 %, sizes known before": [{"name": "flowcut", "keep": 0.5, "entropy": 0.8}],
    "flowcut, 20 %": [{"name": "flowcut", "keep": 0.2}],
    "fastv, 50 %": [{"name": "fastv", "keep": 0.5}],
    "fastv, 20 %": [{"name": "fastv", "keep": 0.2}],
    "yopo": ["yopo"],
    "yopo, 5 layers": [{"name": "yopo", "layer": 5}],
    "zipvl": ["zipvl"],
    "fastv, all but 32": [{"name": "fastv", "keep": 0.9445}],
    "hired, all but 32": [{"name": "hired", "keep": 0.9445}],
}
Say = Callable[[str], None]
Row = dict[str, Any]


def model(layers: tuple[int, int], small: bool) -> Any:
    """A LLaVA of these shapes, random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    little: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tower = little | {"image_size": 96} if small else {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 384,
    }  # fmt: skip
    text = little if small else {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, num_hidden_layers=layers[0], patch_size=16),
        text_config=LlamaConfig(
            **text, num_hidden_layers=layers[1], vocab_size=1024 if small else 49152, max_position_embeddings=4096
        ),
        image_token_id=IMAGE,
    )
    return LlavaForConditionalGeneration(config).eval()


def question(vlm: Any, batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words around the places of images, and their pixels, in each text."""
    side = vlm.config.vision_config.image_size
    places = frames * (side // 16) ** 2
    ids = torch.randint(16, 1000, (batch, TEXT + places))
    ids[:, 4 : 4 + places] = IMAGE
    return ids, torch.randn(batch * frames, 3, side, side)


_CALL = """
def call(model, ids, pixels, cache):
    return model(input_ids=ids, pixel_values=pixels, past_key_values=cache, logits_to_keep=1).logits
"""


class Timed:
    """One candidate: the first token, and some after it."""

    def __init__(self, vlm: Any, passes: list[Any] | None, given: tuple[torch.Tensor, torch.Tensor]) -> None:
        how: dict[str, Any] = {} if passes is None else {"backend": "accelpass", "options": {"passes": passes}}
        self.fast = torch.compile(own_call(_CALL), dynamic=False, **how)
        self.vlm, self.ours, (self.ids, self.pixels) = vlm, passes is not None, given
        self.first: list[float] = []
        self.later: list[float] = []
        self.peak = self.stored = 0.0

    def cache(self) -> Any:
        from transformers import StaticCache

        room = self.ids.shape[1] + SPARE
        if self.ours:
            return accelpass.KVCache(self.vlm, room, batch_size=len(self.ids))
        return StaticCache(config=self.vlm.config.get_text_config(), max_cache_len=room)

    def __call__(self) -> None:
        cache = self.cache()
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
        before = resident("VmRSS")
        start = time.perf_counter()
        chosen = self.read(cache).argmax(-1)
        self.first.append(time.perf_counter() - start)
        self.peak = (resident("VmHWM") - before) / 1e6
        start = time.perf_counter()
        for _ in range(ANSWER):
            chosen = self.fast(self.vlm, chosen, None, cache).argmax(-1)
        self.later.append((time.perf_counter() - start) / ANSWER)
        self.stored = cache.nbytes() / cache.dense_nbytes() if self.ours else 1.0

    def read(self, cache: Any) -> torch.Tensor:
        """The prompt's logits."""
        made: torch.Tensor = self.fast(self.vlm, self.ids, self.pixels, cache)
        return made


_TOWER = """
def call(model, pixels):
    seen = model.model.vision_tower(pixels, output_hidden_states=True)
    return model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:]), seen.pooler_output
"""
_EMBEDDED = """
def call(model, embeds, cache):
    return model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1).logits
"""


class Merged(Timed):
    """D-CoDe: a share of each frame's tokens is read, chosen on the host between the compiled tower and the compiled language model."""

    def __init__(self, vlm: Any, share: float, given: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__(vlm, [], given)
        how: dict[str, Any] = {"backend": "accelpass", "dynamic": False}
        self.see, self.embedded = (torch.compile(own_call(code), **how) for code in (_TOWER, _EMBEDDED))
        self.share = share

    def read(self, cache: Any) -> torch.Tensor:
        features, frames = self.see(self.vlm, self.pixels)
        share = int(self.share * features.shape[1])
        kept = video_tokens(features, frames, len(frames), kept=share, threshold=1.0)
        words = self.vlm.get_input_embeddings()(self.ids)
        places = features.shape[0] * features.shape[1]
        made: torch.Tensor = self.embedded(
            self.vlm, torch.cat([words[:, :4], kept[None], words[:, 4 + places :]], 1), cache
        )
        return made


def candidate(vlm: Any, name: str, given: tuple[torch.Tensor, torch.Tensor]) -> Timed:
    """What a name means."""
    if name.startswith("d_code"):
        return Merged(vlm, float(name.split()[1]) / 100, given)
    return Timed(vlm, (CANDIDATES | OF_VIDEOS)[name], given)


@torch.no_grad()
def measure(names: Sequence[str], case: str, rounds: int, small: bool, say: Say) -> list[Row]:
    """A row for each candidate at this batch, or of this video."""
    torch._dynamo.reset()
    vlm = model((4, 4) if small else LAYERS[case], small)
    batch, frames = (1, int(case.split()[0])) if case == VIDEO else (int(case), 1)
    given = question(vlm, batch, frames)
    vlm(input_ids=given[0], pixel_values=given[1], use_cache=False)  # transformers installs hooks at the first call
    runs: dict[str, Timed] = {}
    compiling: dict[str, float] = {}
    graphs: dict[str, int] = {}
    for name in names:
        say(f"{case}: compiling {name}")
        start = time.perf_counter()
        runs[name] = candidate(vlm, name, given)
        before = counters["stats"]["unique_graphs"]
        runs[name]()
        compiling[name], graphs[name] = time.perf_counter() - start, counters["stats"]["unique_graphs"] - before
    say(f"{case}: in turns, so that the machine should have nothing else to do")
    for _ in range(rounds + 1):  # of which the first may compile once more
        for run in runs.values():
            run()
    dense = runs[INDUCTOR]
    rows = []
    for name, run in runs.items():
        first, later = (statistics.median(s[2:]) for s in (run.first, run.later))
        rows.append(
            {
                "name": name,
                "first_token_s": round(first, 4),
                "first_of_inductor": round(first / statistics.median(dense.first[2:]), 3),
                "token_ms": round(1e3 * later, 1),
                "token_of_inductor": round(later / statistics.median(dense.later[2:]), 3),
                "peak_mb": round(run.peak, 1),
                "cache_of_dense": round(run.stored, 3),
                "compile_s": round(compiling[name], 1),
                "graphs": graphs[name],
            }
        )
        print(json.dumps({"case": case, **rows[-1]}), flush=True)
    return rows


def write_tables(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page."""
    lines = [f"Measured on {content['cpu']}, {content['threads']} threads, in turns.", ""]
    for case, rows in content["batches"].items():
        tower, text = LAYERS[case]
        lines += row_lines(f"{case if case == VIDEO else f'batch {case}'}, {tower} + {text} layers", rows)
    put_table(page, START, "\n".join(lines), END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--batches", default="1,16", help=f"numbers of texts, with commas: {', '.join(map(str, LAYERS))}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="candidates that contain one of these words, with commas")
    asked = parser.parse_args()
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # before transformers is imported: the check breaks the graph
    say: Say = partial(print, file=sys.stderr, flush=True)
    words = [w for w in asked.only.split(",") if w]
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"batches": {}}
    for case in asked.batches.split(","):
        among = OF_VIDEOS if case == VIDEO else CANDIDATES
        names = [n for n in among if n == INDUCTOR or not words or any(w in n for w in words)]
        rows = measure(names, case, 1 if asked.small else asked.rounds, asked.small, say)
        if not asked.small:
            content |= {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
            old = {row["name"]: row for row in content["batches"].get(case, []) if words}
            content["batches"][case] = list((old | {row["name"]: row for row in rows}).values())
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            write_tables(content)


if __name__ == "__main__":
    main()
