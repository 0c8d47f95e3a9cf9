"""Numbers drawn by lot: spread as they should be, and the same whatever is computed beside them."""

from __future__ import annotations

import torch

from accelpass.passes.kv_cache.storage.lots import drawn, gumbel


def test_numbers_are_spread_evenly():
    x = drawn(torch.arange(600)[:, None], 3, torch.arange(500))
    assert 0 < float(x.min()) < 1e-4 and 1 - 1e-4 < float(x.max()) < 1
    shares = torch.histc(x, 10, 0, 1) / x.numel()
    assert (shares - 0.1).abs().max() < 5e-3
    for lines in (x[:5], x[:, :5].t()):
        assert torch.corrcoef(lines).fill_diagonal_(0).abs().max() < 0.2


def test_noise_is_of_gumbels_distribution():
    noise = gumbel(torch.arange(600)[:, None], torch.arange(500))
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.02 and abs(float(noise.std()) - torch.pi / 6**0.5) < 0.02


def test_a_part_is_what_the_whole_has_there():
    whole = drawn(torch.arange(40)[:, None], torch.arange(30))
    assert torch.equal(drawn(torch.tensor([[7], [31]]), torch.arange(5, 9)), whole[[7, 31], 5:9])
    assert not torch.equal(whole, drawn(torch.arange(40)[:, None], torch.arange(30) + 1_000_003))
