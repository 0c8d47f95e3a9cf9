"""Groups of data are probed apart, and padding is no token of any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import accelpass
from accelpass.ir.core.program import Program
from accelpass.ir.transform.real_tokens import NoTokens, real_tokens
from accelpass.ir.transform.tap import Tap, tap
from accelpass.models_zoo import small
from accelpass.passes.core.base import Done, Pass, Record
from tests.ir.test_tap import program_of


@dataclass(frozen=True)
class Active(Pass):
    """How often each channel of an MLP is positive: what LAPE (arXiv 2402.16438) compares languages by."""

    padding_counts: bool = False
    name: ClassVar[str] = "active"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "counts active channels"

    def apply(self, program: Program, record: Record) -> None:
        def count(x: Tensor, real: Tensor) -> Tensor:
            return ((x > 0) & real.unsqueeze(-1)).sum((0, 1))

        one = Tap("act", lambda x: (x > 0).sum((0, 1))) if self.padding_counts else Tap("act", count, also=real_tokens)
        for name in tap(program, [one], self.name):
            record.take(name, Done("counted"))


def active(model, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The truth: each sequence alone, without its padding."""
    found = [torch.zeros(64, dtype=torch.long) for _ in model.model.layers]
    for row, real in zip(ids, mask, strict=True):
        seen: list[Tensor] = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(row[real != 0][None], use_cache=False)
        for handle in handles:
            handle.remove()
        found = [f + (x > 0).sum((0, 1)) for f, x in zip(found, seen, strict=True)]
    return found


def texts(seed: int, *lengths: int, left: bool = False) -> dict[str, Tensor]:
    """Sequences of unlike lengths, padded on one side."""
    most = max(lengths)
    ids = torch.randint(1, 64, (len(lengths), most), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(most)
    mask = torch.stack([(places >= most - n) if left else (places < n) for n in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_groups_are_counted_apart_and_padding_is_not_counted():
    model = small.decoder()
    groups = {
        "fr": [texts(0, 5, 8), texts(1, 9, 9)],
        "en": [texts(2, 6, 3, 8)["input_ids"], texts(3, 4, 7, left=True)],
    }
    found = accelpass.probe(model, Active(), groups, progress=False)
    assert list(found) == ["fr", "en"]
    for name, batches in groups.items():
        wanted = [torch.zeros(64, dtype=torch.long)] * 2
        tokens = 0
        for batch in batches:
            given = batch if isinstance(batch, dict) else {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            wanted = [w + a for w, a in zip(wanted, active(model, *given.values()), strict=True)]
            tokens += int(given["attention_mask"].sum())
        assert found[name].tokens == tokens
        for layer, want in enumerate(wanted):
            assert torch.equal(found[name].values[f"model.layers.{layer}.mlp.act"], want)


def test_what_another_compiled_form_has_gathered_stays():
    model, ids = small.decoder(), torch.arange(8)[None]
    fast = torch.compile(model, backend="accelpass", options={"passes": [Active()], "lowering": "eager"})
    cache = accelpass.KVCache(model, 16)
    with torch.no_grad():
        fast(ids, past_key_values=cache)
    before = accelpass.read(fast, "active.*")
    accelpass.probe(model, Active(), {"one": [ids + 3]}, progress=False)
    after = accelpass.read(fast, "active.*")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert cache.get_seq_length() == 8
    other = small.decoder(1)
    accelpass.probe(other, Active(), {"one": [ids]}, progress=False)
    assert not accelpass.state(torch.compile(other, backend="accelpass")), "nothing is left behind"


def test_a_model_without_a_mask():
    model, ids = small.tiny_lm(), torch.arange(10).reshape(2, 5)
    found = accelpass.probe(model, Active(), {"all": [ids]}, progress=False)["all"]
    with torch.no_grad():
        x = model.embed(ids)
        mlp = model.layers[0]
        want = ((F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) > 0).sum((0, 1))
    assert found.tokens == 10 and torch.equal(found.values["layers.0.act"], want)


def test_what_cannot_be_probed_is_told():
    model, ids = small.decoder(), torch.arange(8)[None]
    with pytest.raises(accelpass.OptionError, match="needs groups"):
        accelpass.probe(model, Active(), {}, progress=False)
    with pytest.raises(accelpass.OptionError, match="'fr' has no batch"):
        accelpass.probe(model, Active(), {"en": [ids], "fr": []}, progress=False)
    with pytest.raises(accelpass.OptionError, match="there is padding, which active"):
        accelpass.probe(model, Active(padding_counts=True), {"en": [ids], "fr": [texts(0, 3, 5)]}, progress=False)
    assert accelpass.probe(model, Active(padding_counts=True), {"en": [ids]}, progress=False)["en"].tokens == 8
    with pytest.raises(accelpass.PassError, match="gathers nothing"):
        accelpass.probe(model, "roll_loop", {"en": [ids]}, progress=False)


def test_a_graph_without_tokens_has_no_padding_to_tell():
    program, _ = program_of(small.decoder(), torch.arange(6)[None])
    (real,) = real_tokens(program)
    assert real.meta["val"].shape == (1, 6) and real.meta["val"].dtype == torch.bool
    program.tensors.callers = list  # type: ignore[method-assign]
    with pytest.raises(NoTokens, match="neither token ids"):
        real_tokens(program)
