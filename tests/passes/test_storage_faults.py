"""A third party's storage, format or selection that fails while it is traced is named with its pass, method and attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import accelpass
from accelpass import KVCache
from accelpass.ir.attention import detect
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec, Places, ScoreTap
from accelpass.ir.core.program import Program
from accelpass.ir.kv.banks import Floats
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Positions, RowSelect
from accelpass.passes.core.base import Done, Pass, Record, Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from tests.passes.test_kv_methods import llama, tokens

SITE = r"at model\.layers\.1\.self_attn"


@dataclass(frozen=True)
class Broken(Positions):
    """Does in one of its methods what a test says; in the second layer alone."""

    part: ClassVar[str] = "test_broken"
    how: str = ""

    def fill(self, held: Any, new: Any, layout: Any, format: Any) -> None:
        if self.how == "fill":
            held["keys"].index_copy_(2, torch.arange(3), new.k)
        super().fill(held, new, layout, format)

    def states(self, layout: Any, format: Any) -> Any:
        return None if self.how == "states" else super().states(layout, format)

    def advance(self, new: Any) -> Any:
        return "one" if self.how == "advance" else super().advance(new)

    def extend(self, held: Any, new: Any, query: Any, layout: Any, format: Any) -> Any:
        if self.how == "append":
            self.append(held, new)
        out = super().extend(held, new, query, layout, format)
        return {"shape": out[:, :2], "dtype": out.double(), "nothing": None}.get(self.how, out)

    def append(self, held: Any, new: Any) -> None:
        held["keys"].add_(new.k.transpose(-1, -2))


@dataclass(frozen=True)
class Unreadable(Floats):
    part: ClassVar[str] = "test_unreadable"

    def encode(self, rows: Tensor) -> list[Tensor]:
        raise KeyError("codes")


@dataclass(frozen=True)
class Forgetful(RowSelect):
    part: ClassVar[str] = "test_forgetful"

    def attend(self, held: Any, new: Any, query: Any, layout: Any, format: Any, rows: Any) -> Any:
        return new.q


@dataclass(frozen=True)
class Crooked(ScoreTap):
    part: ClassVar[str] = "test_crooked"
    how: str

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        if self.how == "line":
            return scores.softmax(-1).sum(2) @ torch.eye(5)
        made = scores.softmax(-1).sum((2, 3))
        return made.sum(1) if self.how == "no heads" else made.double()


@dataclass(frozen=True)
class Acme(KVPass):
    """Gives the second layer's attention what a test says."""

    given: Any = None

    name: ClassVar[str] = "acme"
    summary: ClassVar[str] = ""

    def edited(self, program: Program, site: KVSite, spec: AttentionSpec, number: int) -> Any:
        if site.path == "model.layers.0.self_attn":
            return Skip("the first")
        kind = {Broken: "store", Unreadable: "format", Forgetful: "select", HeavyHitters: "store"}[type(self.given)]
        return spec.edited(by=self.name, **{kind: self.given}), "broken"


def generated(given: Any) -> None:
    model = llama()
    fast = accelpass.compile(model, [Acme(given=given)], lowering="eager")
    cache = KVCache(model, 48)
    with torch.no_grad():
        for piece in tokens(1, 6, 1):
            fast(input_ids=piece, past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Broken(how="append"), rf"the pass 'acme', Broken\.append {SITE}: RuntimeError: .*\(test_storage_faults\.py:\d+\); "
            r"expected shape \(1, 4, 1, 16\) float32 of the attention of q \(1, 4, 1, 16\) .* keys \(1, 2, 48, 16\) float32"),
        (Broken(how="fill"), rf"the pass 'acme', Broken\.fill {SITE}: .*; expected to store k \(1, 2, \w+, 16\) float32"),
        (Broken(how="shape"), rf"Broken\.extend {SITE}: it returned \(1, 2, 1, 16\) float32; expected shape \(1, 4, 1, 16\)"),
        (Broken(how="dtype"), rf"Broken\.extend {SITE}: it returned \(1, 4, 1, 16\) float64; .* float32 of"),
        (Broken(how="nothing"), rf"Broken\.extend {SITE}: it returned NoneType, no tensor"),
        (Broken(how="states"), rf"Broken\.states {SITE}: it returned None; expected a list of StateSpec for Layout"),
        (Broken(how="advance"), rf"Broken\.advance {SITE}: it returned str, no number of tokens"),
        (Unreadable(), rf"the pass 'acme', Unreadable\.encode {SITE}: KeyError: 'codes' \(test_storage_faults"),
        (HeavyHitters(0.2, 0.2, score=Crooked("no heads")), rf"the pass 'acme', Crooked\.__call__ {SITE}: it returned \(1, 3\) "
            r"float32; expected \(1, 2, 3\) float32, what each key gets of scores \(batch=1, kv_heads=2, groups, rows=2, keys=3\)"),
        (HeavyHitters(0.2, 0.2, score=Crooked("dtype")), rf"Crooked\.__call__ {SITE}: it returned \(1, 2, 3\) float64; expected"),
        (HeavyHitters(0.2, 0.2, score=Crooked("line")), rf"Crooked\.__call__ {SITE}: RuntimeError: .*\(test_storage_faults\.py:"),
        (Forgetful(), rf"the pass 'acme', Forgetful\.attend {SITE}: it returned .*, not \(attention, rows or None\)"),
    ],
    ids=lambda given: "" if isinstance(given, str) else getattr(given, "how", type(given).__name__),
)  # fmt: skip
def test_what_fails_while_it_is_traced(given: Any, said: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=said):
        generated(given)


def test_one_that_works_is_left_in_peace() -> None:
    generated(Broken())


@dataclass(frozen=True)
class Listed(BlockSelect):
    part: ClassVar[str] = "test_listed"
    how: str = ""

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Any:
        if self.how == "raises":
            return q @ k
        made = torch.zeros(1, 2, 1, dtype=torch.int64 if self.how == "dtype" else torch.int32)
        return made if self.how == "tensor" else Blocks(made, torch.ones(1, 2, dtype=torch.int32), 8)


@dataclass(frozen=True)
class Selecting(Pass):
    """Gives each attention a selection."""

    given: Callable[[], Any] | Any = None

    name: ClassVar[str] = "selecting"
    phase: ClassVar[str] = "attention"
    summary: ClassVar[str] = ""

    def apply(self, program: Program, record: Record) -> None:
        for site in program.analysis(detect):
            assert site.node is not None
            set_spec(site.node, spec_of(site.node).edited(by=self.name, select=self.given))
            record.take(site.path, Done("selected"))


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"the pass 'selecting', Listed\.blocks at core: RuntimeError: .*; expected blocks of keys for q \(1, 2, 16, 8\)"),
        ("dtype", r"Listed\.blocks at core: blocks is \(1, 2, 1\) int64, and \(tables, q_blocks, most\) int32 is needed"),
        ("tensor", r"Listed\.blocks at core: it returned .*Tensor, no Blocks of tensors"),
    ],
)  # fmt: skip
def test_a_selection_of_blocks(how: str, said: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential()
    model.add_module("core", Causal())
    fast = accelpass.compile(model.eval(), [Selecting(given=Listed(how=how))], lowering="eager")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=said):
        fast(torch.randn(1, 2, 16, 8))
