"""A stamp fits a tensor until something of it changes, its values included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelpass.ir.core.weight_identity import VOID, probes, same_values, stamp

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.complex64, torch.bool]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 3))
def test_every_layout_has_a_probe(sizes, dtype, transposed, offset):
    whole = torch.ones(offset + int(torch.Size(sizes).numel()), dtype=dtype)
    tensor = whole[offset:].reshape(sizes)
    tensor = tensor.mT if transposed and tensor.dim() > 1 else tensor
    (probe,) = probes([tensor])
    assert len(probe) == min(tensor.numel(), 8)
    assert stamp(tensor).fits(tensor)
    if tensor.numel():
        known = stamp(tensor)
        tensor.data.zero_()
        assert not known.fits(tensor)


@pytest.mark.parametrize(
    "change",
    {
        "in place": lambda p: p.add_(1),
        "through data": lambda p: p.data.add_(1),
        "re-pointed": lambda p: setattr(p, "data", p.data.clone()),
        "there and back": lambda p: (setattr(p, "data", p.data.double()), setattr(p, "data", p.data.float())),
        "memory given back": lambda p: p.untyped_storage().resize_(0),
    }.items(),
    ids=lambda item: item[0],
)
def test_changes(change):
    weight = nn.Parameter(torch.randn(16, 16))
    known = stamp(weight)
    with torch.no_grad():
        assert known.fits(weight)
        change[1](weight)
    assert not known.fits(weight)


def test_values_that_are_not_numbers_are_themselves():
    weight = torch.full((4,), float("nan"))
    assert stamp(weight).fits(weight)
    assert not same_values([(1.0,)], [(2.0,)])
    assert not VOID.fits(weight)


def test_memory_is_not_kept():
    """A stamp knows memory without keeping it: the storage of a weight that was re-pointed is freed."""
    weight = nn.Parameter(torch.randn(4))
    known = stamp(weight)
    weight.data = torch.zeros(4)
    assert known.storage() is None
