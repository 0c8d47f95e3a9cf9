"""What ways of finding int4 codes cost in quality, at equal bits: perplexity of SmolLM2, and embeddings of MiniLM.

    python -m benchmarks.weight_rounding --samples 128      # half an hour; --samples 16 for a look; goes on where it was stopped
    python -m benchmarks.weight_rounding --model minilm --samples 64
    python -m benchmarks.weight_rounding --methods "" --samples 16 --peer PYTHON   # llama.cpp's files of SmolLM2, with a Python that has it

Neither scores text that a calibration saw. SmolLM2's weights were in 4 bits with groups of 32 once (GGUF's Q4_1), which flatters a grid
that is alike; its head, tied to the embedding, is left out of every method. MiniLM's are the floats that it was trained to. A row says
the bits of a weight of its linears, scales counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accelpass
from accelpass.models_zoo import minilm, smollm2
from benchmarks import sentence_quality
from benchmarks.gguf_peers import KINDS, Peer
from benchmarks.machine import cpu, goes_on
from benchmarks.quality import WINDOW, perplexity, prose

RESULTS = Path(__file__).parent / "results"
FOUR = (
    "int4_weights", "int4_weights half", "int4_weights search", "torchao", "hqq", "hqq half", "awq", "gptq", "gptq half", "gptq order",
)  # fmt: skip
LEARN = ("awq", "gptq", "smoothquant")
GRIDS = {"4.5 bits": {"group_size": 64}, "5 bits": {"group_size": 32}}
ZEROS = {"4.5 bits": "5 bits", "5 bits": "6 bits"}
"""With a zero point for each group in float32; in float16 both take as much as the scale alone does."""
_HALF: dict[str, Any] = {"symmetric": False, "scales": "float16"}
MORE: dict[str, dict[str, Any]] = {
    "int4_weights half": _HALF, "hqq half": _HALF, "gptq half": {**_HALF, "order": True}, "gptq order": {"order": True},
    "int4_weights search": {"search": True},
}  # fmt: skip
TOKENS = 512
Figures = dict[str, float]


class Subject(ABC):
    """A model with real weights, text, and what is measured on it.

    Attributes:
        exclude: of its linears and embeddings, what is left out of every method.
        data: what methods learn from; no text that is scored.
    """

    exclude: Sequence[str]
    model: Any
    data: list[Tensor]

    @abstractmethod
    def figures(self, fast: Any) -> Figures:
        """What is measured of the model, rounded or not."""

    def floats(self) -> Figures:
        """The same of the model as it is."""
        return measured(self, {"passes": []})


class SmolLM2(Subject):
    """Perplexity on prose."""

    exclude = ("lm_head", "embed_tokens")

    def __init__(self, samples: int, scored: int) -> None:
        self.model, tokenizer = smollm2.load(torch.float32)
        self.ids = prose(tokenizer, scored)
        seen = prose(tokenizer, 10**9)[:, 8192 : 8192 + samples * TOKENS]
        self.data = [part for part in seen.split(TOKENS, 1) if part.shape[1] == TOKENS]

    def figures(self, fast: Any) -> Figures:
        return {"perplexity": perplexity(lambda window: fast(window, use_cache=False).logits, self.ids)}


class MiniLM(Subject):
    """Embeddings of passages, and how they rank each other."""

    exclude = ("pooler*", "embeddings*")

    def __init__(self, samples: int, scored: int) -> None:
        self.model, self.tokenizer = minilm.load(torch.float32)
        self.scored, others = sentence_quality.passages(scored)
        text = self.tokenizer(" ".join(others), return_tensors="pt", verbose=False).input_ids
        pieces = text.split(TOKENS // 4, 1)
        self.data = [part for part in pieces if part.shape[1] == TOKENS // 4][:: max(1, len(pieces) // samples)]
        self.data = self.data[:samples]
        self.dense = sentence_quality.embeddings(self.model, self.tokenizer, self.scored)

    def figures(self, fast: Any) -> Figures:
        made = sentence_quality.embeddings(fast, self.tokenizer, self.scored)
        return sentence_quality.figures(made, self.dense, self.scored)

    def floats(self) -> Figures:
        return sentence_quality.figures(self.dense, self.dense, self.scored)


SUBJECTS: dict[str, tuple[type[Subject], str, int]] = {
    "smollm2": (SmolLM2, "smollm2_weight_rounding_cpu.json", 4096),
    "minilm": (MiniLM, "minilm_weight_rounding_cpu.json", 120),
}
"""What it is, where its results are, and how many tokens or passages are scored."""


def measured(subject: Subject, options: dict[str, Any]) -> Figures:
    torch._dynamo.reset()
    fast = torch.compile(subject.model, backend="accelpass", options={"lowering": "aten", **options})
    with torch.no_grad():
        return subject.figures(fast)


def by_torchao(subject: Subject, group_size: int) -> Figures:
    """torchao's int4, rounded to the nearest: a symmetric grid whose scale is the largest magnitude by 7.5."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config, made = IntxWeightOnlyConfig(torch.int4, PerGroup(group_size)), copy.deepcopy(subject.model)
    left = tuple(name.rstrip("*") for name in subject.exclude)
    quantize_(made, config, lambda m, name: isinstance(m, nn.Linear) and not name.startswith(left))
    with torch.no_grad():
        return subject.figures(made)


def by_llama(subject: SmolLM2, python: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """llama.cpp's own files, made of the weights that the zoo reads; its bits are of a whole file's weights, the head's among them."""
    windows = [part[0].tolist() for part in subject.ids.split(WINDOW, 1)]
    weights = sum(p.numel() for p in subject.model.parameters())
    made = []
    for kind in KINDS:
        peer = Peer(f"llama.cpp {kind}", python, RESULTS.parents[1] / "build" / "gguf", WINDOW, 8)
        found = _beside({"perplexity": peer.perplexity(windows)}, rows)
        made.append({"method": peer.name, "bits": f"{8 * peer.about['bytes'] / weights:.1f} bits", **found})
        peer.close()
    return made


def entries(methods: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, bits of a weight, and the pass."""
    for name in methods:
        for bits, grid in (GRIDS if name in FOUR else {"8 bits": {}}).items():
            yield (
                name,
                ZEROS[bits] if name == "hqq" else bits,
                {"name": name.split()[0], **grid, **MORE.get(name, {})},
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SUBJECTS), default="smollm2")
    parser.add_argument("--samples", type=int, default=128, help="of text, for methods that learn from data")
    parser.add_argument("--methods", default=",".join((*FOUR, "smoothquant", "int8_dynamic")))
    parser.add_argument("--peer", help="a Python that has llama-cpp-python: its Q4_0 and Q8_0 of the same weights, too")
    parser.add_argument("--tokens", type=int, help="that are scored; of MiniLM, passages")
    given = parser.parse_args(arguments)
    kind, file, scored = SUBJECTS[given.model]
    results, scored = RESULTS / file, given.tokens or scored
    subject = kind(given.samples, scored)
    settings = {"cpu": cpu(), "torch": torch.__version__, "samples": len(subject.data), "tokens": scored}
    before = json.loads(results.read_text()) if results.is_file() else {}
    rows: list[dict[str, Any]] = before["rows"] if goes_on(before, settings) else []
    done = {(row["method"], row["bits"]) for row in rows}
    if not rows:
        rows = [{"method": "dense", "bits": "32 bits", **_beside(subject.floats(), [])}]
    for name, bits, entry in entries(list(filter(None, given.methods.split(",")))):
        if (name, bits) in done:
            continue
        start = time.monotonic()
        if name == "torchao":
            taken, found = 0.0, by_torchao(subject, entry["group_size"])
        else:
            entry["exclude"] = list(subject.exclude)
            options: dict[str, Any] = {"passes": [entry]}
            if entry["name"] in LEARN:
                options = {"plan": accelpass.calibrate(subject.model, subject.data, [entry])}
            taken = time.monotonic() - start
            found = measured(subject, options)
        rows.append({"method": name, "bits": bits, **_beside(found, rows), "seconds": taken})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        _keep(results, settings, rows)  # as it goes: what is there is not measured again
    if given.peer and isinstance(subject, SmolLM2):
        kept = [row for row in rows if not row["method"].startswith("llama.cpp")]
        rows = kept + by_llama(subject, given.peer, rows)
        _keep(results, settings, rows)
    names = [name for name in rows[0] if name not in ("method", "bits")]
    table = Table("method", "bits of a linear's weight", *(n.replace("_", " ") for n in names), "to calibrate, s")
    for row in rows:
        seconds = f"{row.get('seconds', 0):.0f}"
        table.add_row(row["method"], row["bits"], *(f"{row[name]:.4f}" for name in names), seconds)
    Console().print(table)
    return 0


def _keep(results: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows, and the most memory that a process took which measured some of them."""
    before = json.loads(results.read_text()) if results.is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if same := goes_on(before, settings):
        settings, peak = same, max(peak, before.get("peak_gib", 0.0))
    results.write_text(json.dumps({**settings, "peak_gib": peak, "rows": rows}, indent=1) + "\n")


def _beside(found: Figures, rows: list[dict[str, Any]]) -> Figures:
    """A perplexity by that of the dense model, too."""
    if "perplexity" not in found:
        return found
    return found | {"ratio": found["perplexity"] / (rows[0] if rows else found)["perplexity"]}


if __name__ == "__main__":
    sys.exit(main())
