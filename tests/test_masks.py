"""Every pass on odd masks: exact at its identity setting, nothing hidden is read, or refused; and the check sees a pass that lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from accelpass.ir.attention import detect, set_spec, spec_of
from accelpass.ir.attention.spec.block_select import MASKS as HIDING
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Pass, Record
from accelpass.testing.masked_decoders import MASKED_DECODERS
from accelpass.testing.masks import MASKS, check_masks
from accelpass.testing.trial import Trial
from tests.pass_settings import names, setting
from tests.sweep import quick

FEW = {name: MASKS[name] for name in ("prefix", "packed texts, as an argument", "padding on the left", "sinks")}


@dataclass(frozen=True)
class Careless(Pass):
    """Takes every attention for a causal one."""

    name: ClassVar[str] = "careless"
    phase: ClassVar[str] = "attention"
    summary: ClassVar[str] = "a pass that lies"
    identity: ClassVar[dict[str, Any] | None] = {}

    def apply(self, program: Program, record: Record) -> None:
        for site in program.analysis(detect):
            spec = spec_of(site.node)
            steps = tuple(step for step in spec.steps if step.kind not in HIDING)
            set_spec(site.node, replace(spec, causal=True, steps=steps, bias="causal"))
            record.take(site.path, Done("causal"))


@dataclass(frozen=True)
class NeverDense(Careless):
    """The same without an identity setting."""

    name: ClassVar[str] = "never_dense"
    identity: ClassVar[dict[str, Any] | None] = None


def test_a_pass_that_takes_any_mask_for_a_causal_one_is_found_out():
    told = {f.subject: f for f in check_masks(Trial.of(Careless), FEW, ())}
    assert told["mask: packed texts, as an argument"].status == "failed"
    assert told["mask: prefix"].status == "failed"
    (only_working,) = check_masks(Trial.of(NeverDense), {"packed": FEW["packed texts, as an argument"]}, ())
    assert only_working.what == "the value of token 0 reaches tokens from which the mask hides it"


@pytest.mark.parametrize("name", quick(names(), "xattention", "moa"))
def test_prompts(name):
    for finding in check_masks(setting(name).trial(name), FEW if name == "xattention" else MASKS, ()):
        assert finding.status != "failed", finding


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(names(), "tidaldecode"))
def test_decoders(name):
    some = MASKED_DECODERS[-1:] if name == "tidaldecode" else MASKED_DECODERS
    for finding in check_masks(setting(name).trial(name), {}, some):
        assert finding.status != "failed", finding
