"""ToMe is what its paper's listing computes, over random towers, and the tensors behind a merge are smaller."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import accelpass
from accelpass.passes.core.base import Record
from accelpass.passes.visual_tokens.tome import ToMe
from tests.ir.test_shrink import captured
from tests.passes.vision_truth import Tower, compiled, tower
from tests.small_models import relative_error
from tests.sweep import examples


def matching(k: Tensor, first: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Appendix D of the paper; tokens in front that are not merged may be several."""
    k = k / k.norm(dim=-1, keepdim=True)
    a, b = k[..., ::2, :], k[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., : (first + 1) // 2, :] = -math.inf
    scores[..., :, : first // 2] = -math.inf
    node_max, node_idx = scores.max(dim=-1)
    edge = node_max.argsort(dim=-1, descending=True)[..., None]
    src = edge[..., :r, :]
    return edge[..., r:, :].sort(dim=-2)[0], src, node_idx[..., None].gather(dim=-2, index=src)


def merge(x: Tensor, how: tuple[Tensor, Tensor, Tensor], first: int) -> Tensor:
    unm, src, dst = how
    a, b = x[..., ::2, :], x[..., 1::2, :]
    n, _, c = a.shape
    kept = a.gather(-2, unm.expand(n, unm.shape[1], c))
    b = b.scatter_add(-2, dst.expand(n, dst.shape[1], c), a.gather(-2, src.expand(n, src.shape[1], c)))
    ones, twos = (first + 1) // 2, first // 2
    front = [kept[:, i // 2, None] if i % 2 == 0 else b[:, i // 2, None] for i in range(first)]
    return torch.cat([*front, kept[:, ones:], b[:, twos:]], dim=-2)


def merged_tower(model: Tower, pixels: Tensor, r: int, proportional: bool = True) -> Tensor:
    """The tower of the paper. ``source`` says of which patches each token is made."""
    x = model.embedded(pixels)
    n, tokens, _ = x.shape
    source = torch.eye(tokens).expand(n, -1, -1)
    for block in model.blocks:
        size = source.sum(-1, keepdim=True)
        bias = size.log().transpose(1, 2)[:, None] if proportional else None
        keys = block.heads_of(x)[1].mean(1)
        x = block.attended(x, bias)
        x = x * size
        if x.shape[1] - model.first > 1:  # one patch has none to be merged with
            how = matching(keys, model.first, min(r, (x.shape[1] - model.first) // 2))
            x, source = (merge(t, how, model.first) for t in (x, source))
        x = block.mlp(x / source.sum(-1, keepdim=True))
    return model.read(source.transpose(1, 2) @ x)


@example(side=2, first=0, r=2, batch=1, proportional=True, seed=0)  # down to one patch
@settings(max_examples=examples(6), deadline=None)
@given(
    side=st.integers(2, 5), first=st.integers(0, 3), r=st.integers(1, 9), batch=st.integers(1, 3),
    proportional=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_papers(side: int, first: int, r: int, batch: int, proportional: bool, seed: int):
    model = tower(seed, side=side, first=first)
    pixels = torch.randn(batch, 3, 4 * side, 4 * side)
    fast = compiled(model, [{"name": "tome", "merge": r, "proportional": proportional}])
    with torch.no_grad():
        assert relative_error(fast(pixels), merged_tower(model, pixels, r, proportional)) < 1e-4
        assert relative_error(model(pixels), fast(pixels)) > 1e-6


def test_what_follows_a_merge_is_smaller():
    model, pixels, width = tower(), torch.randn(2, 3, 16, 16), 16
    counted = []
    for r in (0, 4):
        program, inputs = captured(model, pixels)
        record = Record("tome")
        ToMe(merge=r).apply(program, record)
        program.gm.recompile()
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            program.gm(*program.tensors.binder()(inputs))
        counted.append(flops.get_total_flops())
    # Two images, two operations for each weight: attention of 17, 13 and 9 tokens, MLPs of 13, 9 and 5.
    saved = 2 * 2 * (4 * width * width * (4 + 8) + 4 * width * width * (4 + 8 + 12))
    pairing = sum(2 * 2 * a * b * width // 2 for a, b in ((8, 8), (6, 6), (4, 4)))
    assert counted[0] - counted[1] == saved - pairing
    assert [done.what for done in record.took.values()] == ["17 tokens become 5 over 3 blocks"]


def test_another_number_of_images_is_no_new_graph():
    model = tower()
    fast = compiled(model, [{"name": "tome", "merge": 3}])
    with torch.no_grad():
        for batch in (1, 2, 3, 5):
            pixels = torch.randn(batch, 3, 16, 16)
            assert relative_error(fast(pixels), merged_tower(model, pixels, 3)) < 1e-4


class Biased(Tower):
    """Each block of BEiT adds a bias for each pair of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 2, 17, 17))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedded(pixels)
        for block in self.blocks:
            x = block.mlp(block.attended(x, self.bias))
        return self.read(x)


class Deep(Tower):
    """Something besides the stream reads tokens of an earlier block."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = first = self.blocks[0](self.embedded(pixels))
        for block in self.blocks[1:]:
            x = block(x)
        return self.read(torch.cat([x, first], 1))


@pytest.mark.parametrize(
    ("kind", "why"), [(Biased, "cannot be merged as tokens are"), (Deep, "computed before tokens leave")]
)
def test_what_cannot_follow_is_named(kind: type[Tower], why: str):
    torch.manual_seed(0)
    model, pixels = kind().eval(), torch.randn(1, 3, 16, 16)
    fast = compiled(model, [{"name": "tome", "merge": 3}])
    with torch.no_grad():
        assert relative_error(fast(pixels), model(pixels)) < 1e-5
    assert why in " ".join(accelpass.explain(fast).passes["tome"].skipped.values())


def test_a_decoder_has_no_tower():
    from accelpass.models_zoo import small

    model, ids = small.decoder(), torch.arange(6)[None]
    fast = compiled(model, [{"name": "tome", "merge": 3}])
    with torch.no_grad():
        assert relative_error(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5
    assert "no vision tower was recognised" in " ".join(accelpass.explain(fast).passes["tome"].skipped.values())


def test_options():
    with pytest.raises(Exception, match="merge=-1 is not supported"):
        compiled(tower(), [{"name": "tome", "merge": -1}])(torch.randn(1, 3, 16, 16))
