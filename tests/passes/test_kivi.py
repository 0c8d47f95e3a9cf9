"""kv_quant with per-channel keys against KIVI's algorithm, token by token and on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.api.generation import greedy
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.passes.core.registry import make
from accelpass.passes.kv_cache.storage.channel_blocks import ChannelBlocks
from tests.passes.kv_truth import Oracle, attending, mixed, probabilities, quant_rows
from tests.passes.test_kv_storage import Layer
from tests.public.conftest import tiny_llama
from tests.sweep import examples


def by_channel(k: Tensor, bits: int, block: int) -> Tensor:
    """Keys rounded over blocks of tokens, each channel by itself: the rows of the transposed matrix."""
    return quant_rows(k.transpose(2, 3), bits, block).transpose(2, 3)


class KIVI(Oracle):
    """Algorithm 1: prefill in full; then keys of whole windows by channel, and values but for the newest window by token."""

    def __init__(self, bits: int, block: int, window: int, groups: int) -> None:
        super().__init__()
        self.bits, self.block, self.window, self.groups = bits, block, window, groups

    def attend(self, layer, q, k, v, scale, mask, index):
        before = k.shape[2] - q.shape[2]
        full = before // self.window * self.window
        rounded = max(0, before - self.window)
        keys = torch.cat([by_channel(k[:, :, :full], self.bits, self.block), k[:, :, full:].float()], 2) if full else k
        values = torch.cat(
            [quant_rows(v[:, :, :rounded], self.bits, v.shape[-1] // self.groups), v[:, :, rounded:].float()], 2
        )
        return mixed(probabilities(q, keys, scale, mask), values)


CALLS = st.lists(st.sampled_from([1, 1, 1, 1, 5, 11]), min_size=1, max_size=14)


@settings(max_examples=examples(12), deadline=None)
@given(
    st.integers(1, 2), st.sampled_from([1, 2]), st.sampled_from([8, 16]), st.integers(1, 40), CALLS,
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([(4, 8), (4, 4), (8, 8)]), st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_the_papers_algorithm(batch, groups, width, prompt, calls, bits, sizes, seed) -> None:
    block, window = sizes
    storage, oracle = ChannelBlocks(bits, block, window, 2), KIVI(bits, block, window, 2)
    layer = Layer(storage, Floats(), batch, groups, width, prompt + sum(calls) + 3, seed)
    for tokens in (prompt, *calls):
        q, out = layer.feed(tokens)
        want = oracle.attend({}, q, layer.k, layer.v, layer.scale, None, 0)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=2e-4)


def generated(options: dict[str, object], ids: Tensor, capacity: int, tokens: int) -> tuple[Tensor, Any]:
    torch._dynamo.reset()
    model = tiny_llama(1)
    fast = accelpass.compile(model, [{"name": "kv_quant", **options}], lowering="eager")
    cache, made, fed = accelpass.KVCache(model, capacity, len(ids)), [], ids
    with torch.no_grad():
        for _ in range(tokens):
            fed = fast(fed, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            made.append(fed)
    return torch.cat(made, 1), accelpass.explain(fast).passes["kv_quant"]


def test_a_model_generates_as_with_the_oracle() -> None:
    ids = torch.randint(128, (1, 21), generator=torch.Generator().manual_seed(3))
    options = {"bits": 4, "per_channel_keys": True, "window": 8, "block": 4}
    got, made = generated(options, ids, 40, 12)
    assert len(made.took) == 1 and "keys by channel" in next(iter(made.took.values())).what
    model = tiny_llama(1)
    with torch.no_grad(), attending(model, KIVI(4, 4, 8, 2)) as cache:
        given_ids, want = ids, []
        for _ in range(12):
            logits = model(given_ids, past_key_values=cache, use_cache=True).logits[:, -1]
            given_ids = logits.argmax(-1, keepdim=True)
            want.append(given_ids)
    assert torch.equal(got, torch.cat(want, 1))


def test_a_window_of_everything_is_the_dense_cache() -> None:
    ids = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(3))
    got, _ = generated({"bits": 2, "per_channel_keys": True, "window": 32, "block": 8}, ids, 24, 12)
    model = tiny_llama(1)
    want = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want[:, -12:])


def test_outlier_channels_cost_less_by_channel() -> None:
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 64, 32, generator=draw)
    k[..., 3] = 20 + torch.randn(1, 2, 64, generator=draw)
    assert (by_channel(k, 4, 32) - k).norm() < 0.3 * (quant_rows(k, 4, 16) - k).norm()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_channel_keys": True, "window": 100}, "a multiple of block=32"),
        ({"per_channel_keys": True, "rotate": True}, "False with per_channel_keys"),
    ],
)
def test_options_that_do_not_go_together(given, said) -> None:
    with pytest.raises(OptionError, match=said):
        make({"name": "kv_quant", **given})


def test_an_evicting_pass_beside_is_refused_with_both_names() -> None:
    torch._dynamo.reset()
    model = tiny_llama(1)
    fast = accelpass.compile(model, [{"name": "kv_quant", "per_channel_keys": True}, "h2o"], lowering="eager")
    with pytest.raises(Exception, match="kv_quant") as raised:
        greedy(fast, torch.arange(5)[None], accelpass.KVCache(model, 12), 2)
    assert "h2o" in str(raised.value)
