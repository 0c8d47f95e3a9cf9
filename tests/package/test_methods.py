"""Passes that keep a cache in another form, in packages; and many answers by many threads."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import accelpass
from accelpass import PackageError
from tests.package.conftest import Packaged
from tests.package.decoding import logits, prompts
from tests.public.conftest import tiny_llama
from tests.small_models import relative_error


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes",
    [
        ["int4_weights", {"name": "h2o", "budget": 0.5}, "kv_quant"],
        ["kv_window"],
        [{"name": "xattention", "block": 4, "stride": 2, "threshold": 0.5}],
    ],
    ids=lambda passes: "+".join(p if isinstance(p, str) else p["name"] for p in passes),
)
def test_other_forms_of_a_cache(passes: list[Any], tmp_path: Path) -> None:
    """Rounded rows amplify what bfloat16 products of many rows are off by, so the bound is wider than for weights alone."""
    model, ids = tiny_llama(2), prompts(2, 12)
    example = {"input_ids": prompts(2, 9, 1), "logits_to_keep": 1}
    report = accelpass.package(model, example, passes, path=tmp_path / "m.pt2", cache=32)
    package = accelpass.open(tmp_path / "m.pt2")
    want = logits(model, passes, ids, 8, capacity=32)
    session = package.session()
    got = [session.prompt(ids), *(session.step(one.argmax(-1)) for one in want[:-1])]
    assert max(map(relative_error, got, want)) < (0.06 if "int4_weights" in passes else 1e-4)
    names = [p if isinstance(p, str) else p["name"] for p in passes]
    assert all(_took(report, "prompt")[name] or report.took()[name] for name in names)
    # A prompt of one token: by the prompt's graph if that was found to take it, or refused where its end decides what is kept.
    one = prompts(1, 1)
    if package.graphs["prompt"].graph.inputs[0].shape[-1].least == 1 or package.about.keeps_all:
        (first,) = logits(model, passes, one, 1, capacity=32)
        assert relative_error(package.session().prompt(one), first) < 0.06
    else:
        with pytest.raises(PackageError, match="the package was compiled for 2 or more"):
            package.session().prompt(one)


def _took(report: Any, graph: str) -> dict[str, int]:
    return {r.name: len(r.took) for r in report.records[graph]}


@pytest.mark.slow
def test_two_thousand_answers_by_eight_threads(decoder: Packaged) -> None:
    """Each is that of one thread, and memory does not grow."""
    package = accelpass.open(decoder.path)
    asked = [(prompts(1 + n % 2, 1 + n % 17, n), 1 + n % 8) for n in range(50)]
    alone = [package.generate(ids, new) for ids, new in asked]
    process, held = psutil.Process(), []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            together = list(pool.map(lambda n: package.generate(*asked[n % 50]), range(500)))
            assert all(torch.equal(alone[n % 50], made) for n, made in enumerate(together))
            del together
            gc.collect()
            held.append(process.memory_info().rss)
    assert held[-1] - held[0] < 16e6, held
