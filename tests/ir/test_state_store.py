"""Slots of the state store: whose they are, where they begin, and what reset, reorder, snapshot and restore do to them."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.core.state import StateSpec, StateStore
from tests.sweep import examples

SCORES = StateSpec("h2o.scores", (3,), torch.float32, "sequence", fill=2.0, batched=True)
COUNT = StateSpec("count", (), torch.int64, "model")


class Owner:
    """Anything that can be held weakly."""


def test_a_slot_begins_as_declared_and_stays():
    store, owner = StateStore(), torch.zeros(2)
    slot = store.slot(owner, SCORES)
    assert slot.tensor.tolist() == [[2.0] * 3] * 2
    slot.tensor.add_(1)
    assert store.slot(owner, SCORES) is slot and slot.serves([owner]) and not slot.serves([torch.zeros(2)])
    assert store.slot(torch.zeros(2), SCORES) is not slot, "another owner's is another"


def test_a_slot_goes_with_its_owner():
    store, owner = StateStore(), torch.zeros(2)
    store.slot(owner, COUNT)
    key = id(owner)
    del owner
    gc.collect()
    assert key not in store._slots


def test_reset_is_the_beginning():
    store, owner = StateStore(), torch.zeros(2)
    store.slot(owner, SCORES).tensor.zero_()
    store.keep(owner, "kept", torch.ones(4), "sampling_run", mark=3)
    store.reset(owner)
    assert store.slot(owner, SCORES).tensor.unique().tolist() == [2.0]
    assert store.kept(owner, "kept") is None, "what has no beginning is gone"
    store.reset(Owner())  # one that has nothing


def test_what_is_kept_takes_the_place_of_what_was():
    store, owner = StateStore(), Owner()
    store.keep(owner, "out", torch.ones(4), "sampling_run", mark=1)
    store.keep(owner, "out", torch.zeros(2, 2), "sampling_run", mark=2)
    (found,) = [slot for _, slot in store.of([owner])]
    assert found.spec.shape == (2, 2) and found.mark == 2
    assert store.kept(Owner(), "out") is None


def test_discard_by_name():
    store, owner, other = StateStore(), Owner(), Owner()
    for one in (owner, other):
        store.keep(one, "tap.a", torch.ones(1), "model")
        store.keep(one, "b", torch.ones(1), "model")
    assert list(store.discard([owner], "tap.")) == ["tap.a"]
    assert [(key == id(owner), slot.spec.name) for key, slot in store.of([owner, other])] == [
        (True, "b"), (False, "tap.a"), (False, "b"),
    ]  # fmt: skip


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_snapshots(batch, seed):
    """What came after a snapshot leaves no trace, for its owner and for another; addresses stay."""
    draw = torch.Generator().manual_seed(seed)
    store, owner, other = StateStore(), torch.zeros(batch), torch.zeros(batch)
    before = torch.rand(batch, 3, generator=draw)
    slot = store.slot(owner, SCORES)
    slot.tensor.copy_(before)
    saved = store.snapshot(owner)
    assert saved.nbytes() == before.numel() * 4
    slot.tensor.normal_(generator=draw)
    store.slot(owner, COUNT).tensor.fill_(7)
    store.keep(owner, "later", torch.ones(1), "sequence")
    for one in (owner, other):
        store.restore(one, saved)
        assert torch.equal(store.slot(one, SCORES).tensor, before)
        assert int(store.slot(one, COUNT).tensor) == 0 and store.kept(one, "later") is None
    assert store.slot(owner, SCORES) is slot
    store.slot(other, SCORES).tensor.zero_()
    assert torch.equal(slot.tensor, before), "copies"
    order = torch.randint(0, batch, (batch,), generator=draw)
    store.reorder(owner, order)
    assert torch.equal(slot.tensor, before[order])


def test_an_unknown_lifetime():
    with pytest.raises(ValueError, match="use sequence, sampling_run or model"):
        StateSpec("x", (), torch.float32, "for ever")
