"""Detection, insertion and lowering of attentions, on small models that write it in many ways."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelpass.ir import attention
from accelpass.ir.attention import SinksAndWindow, Store
from accelpass.ir.attention.lowering.lower import COMPOSED, Lowerings
from accelpass.ir.core.capture import from_dynamo, from_export
from accelpass.ir.core.verify import signature, verify

BATCH, TOKENS, HEADS, WIDTH = 2, 6, 4, 8
# Composed attentions sum the same products in another order: 8 products for a score and 6 for an output, of values
# below 4, each rounded to 2**-24.
ATOL = 1e-5


class Attend(nn.Module):
    """q, k, v from linears; ``core`` is what a test writes."""

    def __init__(self, core, kv_heads=HEADS):
        super().__init__()
        self.core, self.kv_heads = core, kv_heads
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, WIDTH * kv_heads), nn.Linear(32, WIDTH * kv_heads)

    def forward(self, x, y=None):
        y = x if y is None else y
        q = self.q(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
        k, v = (f(y).view(*y.shape[:2], self.kv_heads, WIDTH).transpose(1, 2) for f in (self.k, self.v))
        return self.o(self.core(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))


def operators(program):
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def compiled(model, *inputs, dynamic=False, edit=None, lowerings=None):
    """(records, near misses, output, output of eager); the graph is checked after each phase."""
    got = {}
    torch._dynamo.reset()

    def backend(gm, example):
        program = from_dynamo(gm, example)
        before, had = signature(program), operators(program)
        got["misses"] = attention.near_misses(program)
        got["records"] = attention.insert(program)
        verify(program, before, "insert")
        if edit:
            for record in got["records"]:
                edit(record)
        got["lowered"] = attention.lower(program, lowerings)
        verify(program, before, "lower")
        if not edit:
            assert operators(program) == had
        return program.gm

    with torch.no_grad():
        out = torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
        want = model(*inputs)
    return got["records"], got["misses"], out, want


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / 3, -1) @ v


def scaled_query(q, k, v):
    return F.softmax(torch.matmul(q * 0.5, k.transpose(2, 3)), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def in_place(q, k, v):
    scores = q @ k.mT
    scores /= 3
    scores.masked_fill_(torch.ones(q.shape[-2], k.shape[-2]).triu(1) > 0, -1e9)
    return scores.softmax(-1) @ v


def mask_spread_over_scores(q, k, v):
    scores = q @ k.mT
    mask = (torch.ones(q.shape[-2], k.shape[-2]).tril() == 0).expand_as(scores)
    return scores.masked_fill(mask, -1e9).softmax(-1) @ v


def bias_written_in_between(q, k, v):
    scores = q @ k.mT
    bias = torch.ones(q.shape[-2], k.shape[-2])
    bias *= 2
    return (scores + bias).softmax(-1) @ v


def where_min(q, k, v):
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = torch.where(seen, q @ k.mT, torch.full([], -1e9))
    return scores.softmax(-1) @ v


def softcapped(q, k, v):
    return (torch.tanh(q @ k.mT * 0.5 / 20) * 20).softmax(-1) @ v


def centred(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def sunk(q, k, v):
    sink = torch.full((1, HEADS, 1, 1), 0.5).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1] @ v


def merged_heads(q, k, v):
    batch, heads, tokens, width = q.shape
    q, k, v = (t.reshape(batch * heads, tokens, width) for t in (q, k, v))
    bias = torch.ones(batch * heads, tokens, tokens)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=0.25)
    probabilities = (scores.view(batch, heads, tokens, tokens) + 1).softmax(-1)
    return torch.bmm(probabilities.view(batch * heads, tokens, tokens), v).view(batch, heads, tokens, width)


def einsum(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, tokens, heads, width)
    probabilities = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v).transpose(1, 2)


def values_first(q, k, v):
    scores = torch.softmax(q @ k.mT, -1)
    return (v.mT @ scores.mT).mT


def repeated(q, k, v):
    def repeat(t):
        b, h, n, d = t.shape
        return t[:, :, None].expand(b, h, HEADS // h, n, d).reshape(b, HEADS, n, d)

    return F.scaled_dot_product_attention(q, repeat(k), repeat(v))


def interleaved(q, k, v):
    times = HEADS // k.shape[1]
    return by_hand(q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


SPELLINGS = {f.__name__: f for f in (sdpa, by_hand, scaled_query, in_place, where_min, softcapped, centred, sunk)}
SPELLINGS |= {
    f.__name__: f for f in (merged_heads, einsum, values_first, mask_spread_over_scores, bias_written_in_between)
}
GROUPED = {f.__name__: f for f in (repeated, interleaved, enable_gqa)}


def model_of(name):
    torch.manual_seed(0)
    return Attend(SPELLINGS[name]) if name in SPELLINGS else Attend(GROUPED[name], kv_heads=2)


@pytest.fixture
def x():
    return torch.randn(BATCH, TOKENS, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*SPELLINGS, *GROUPED])
def test_every_spelling_is_found_and_given_back(name, dynamic, x):
    (record,), misses, out, want = compiled(model_of(name), x, dynamic=dynamic)
    assert not misses
    assert torch.equal(out, want)
    assert record.kind == "self"
    assert record.spec.groups == (2 if name in GROUPED else 1)
    assert len(record.q_proj) == len(record.k_proj) == len(record.v_proj) == 1
    assert record.o_proj is not None
    assert not record.fused_qkv


@pytest.mark.parametrize("name", [*SPELLINGS, *GROUPED])
def test_a_spec_alone_computes_the_same(name, x):
    def edit(record):
        whole = attention.spec_of(record.node).edited(by="a test", select=SinksAndWindow(sinks=TOKENS, window=1))
        attention.set_spec(record.node, whole)

    _, _, out, want = compiled(model_of(name), x, edit=edit)
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sdpa", "safe_softmax"),
        ("scaled_query", "softmax(float32)"),
        ("in_place", "fill(#0, -1000000000.0) softmax"),
        ("where_min", "keep(#0, #1) softmax"),
        ("softcapped", "softcap(20.0) softmax"),
        ("centred", "center softmax"),
        ("sunk", "sink(#0) softmax drop(1)"),
        ("einsum", "softmax"),
    ],
)
def test_steps(name, steps, x):
    (record,), *_ = compiled(model_of(name), x)
    assert " ".join(step.shown() for step in record.spec.steps) == steps
    assert record.spec.scale == pytest.approx({"sdpa": WIDTH**-0.5, "in_place": 1 / 3, "softcapped": 0.5}.get(name, 1))
    assert (record.spec.bias == "causal") == (name in ("sdpa", "in_place", "where_min"))


def test_export_finds_the_same(x):
    for name in ("repeated", "in_place", "einsum"):
        program = from_export(torch.export.export(model_of(name), (x,)))
        had = operators(program)
        (record,) = attention.insert(program)
        assert attention.detect(program)[0].spec == record.spec
        attention.lower(program)
        assert operators(program) == had


def test_window_is_read_from_the_mask(x):
    def core(q, k, v):
        at = torch.arange(TOKENS)
        behind = at[:, None] - at
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(behind >= 0) & (behind < 3))

    (record,), *_ = compiled(Attend(core), x)
    assert (record.spec.bias, record.spec.window) == ("sliding_window", 3)


@pytest.mark.parametrize(
    ("spelled", "bias"), [("constant", "alibi"), ("padding", "alibi"), ("masked", "alibi"), ("one slope", "tensor")]
)
def test_slopes_times_positions_are_alibi(spelled, bias, x):
    def core(q, k, v):
        heads = 1 if spelled == "one slope" else HEADS
        slopes = (0.5 ** torch.arange(1, heads + 1)).view(-1, 1, 1)
        if spelled == "padding":
            seen = (k[:, 0, :, 0] > -10).long()
            places = ((seen.cumsum(-1) - 1) * seen)[:, None, None, :]
        else:
            places = torch.arange(TOKENS)
        scores = q @ k.transpose(-1, -2) * 0.3 + slopes * places
        if spelled == "masked":
            scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ v

    (record,), *_ = compiled(Attend(core), x)
    assert record.spec.bias == bias


def test_cross_and_joint(x):
    (record,), *_ = compiled(Attend(by_hand), x, torch.randn(BATCH, 3, 32))
    assert record.kind == "cross"

    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(32, 96), nn.Linear(32, 96)

        def forward(self, image, text):
            parts = [f(t).unflatten(-1, (3, HEADS, WIDTH)) for f, t in ((self.image, image), (self.text, text))]
            q, k, v = torch.cat(parts, 1).transpose(1, 3).unbind(2)
            return F.scaled_dot_product_attention(q, k, v)

    (record,), *_ = compiled(Joint(), x, torch.randn(BATCH, 3, 32))
    assert record.kind == "joint"
    assert len(record.q_proj) == 2


def test_probabilities_that_are_returned_stay(x):
    class Returns(nn.Module):
        def forward(self, x):
            scores = x @ x.mT
            scores += 1
            probabilities = scores.softmax(-1)
            return probabilities @ x, probabilities

    x = x.unsqueeze(1)
    (record,), _, out, want = compiled(Returns(), x)
    assert all(map(torch.equal, out, want))
    assert len(record.spec.steps) == 2


def test_statistics(x):
    program = from_export(torch.export.export(model_of("repeated"), (x,)))
    (record,) = attention.insert(program)
    lse = attention.want(record.node, "lse", by="scores")
    assert attention.want(lse.args[0], "lse", by="others") is lse
    assert lse.meta["val"].shape == (BATCH, HEADS, TOKENS)
    (output,) = program.graph.find_nodes(op="output")
    output.args = ((*output.args[0], lse),)
    attention.lower(program)
    program.graph.lint()


NEAR_MISSES = {
    "router": (lambda x, w: (x @ w).softmax(-1), "no matrix product uses the probabilities"),
    "pooling": (lambda x, w: (x @ w).mean(1).softmax(-1) @ w.mT, "no matrix product is behind the softmax"),
    "channels first": (lambda x, w: (x @ x.mT).softmax(-2) @ x, "does not sum over the softmax's dimension"),
    "training": (lambda x, w: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "dropout is on"),
    "from its own scores": (
        lambda x, w: (lambda s: (s + s.sort(-1).values).softmax(-1) @ x)(x @ x.mT),
        "computed from the attention's own scores",
    ),
    "written in part": (
        lambda x, w: (lambda s: (s[..., 0].fill_(0), s.softmax(-1) @ x)[1])(x @ x.mT),
        "writes to a part of",
    ),
    "operand changes": (
        lambda x, w: (lambda y: (lambda p: (y.mul_(2), p @ y)[1])((y @ y.mT).softmax(-1)))(x + 1),
        "while the attention is computed",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_refusals_say_why(name):
    run, why = NEAR_MISSES[name]

    class Model(nn.Module):
        def forward(self, x, w):
            return run(x, w)

    inputs = torch.randn(2, 3, 5, 5), torch.randn(5, 5)
    torch.manual_seed(0)
    records, (miss,), _, _ = compiled(Model(), *inputs)
    assert not records
    assert why in miss.why


@dataclass(frozen=True)
class Elsewhere(Store):
    part: ClassVar[str] = "elsewhere"


def test_no_lowering_names_the_passes(x):
    def edit(record):
        attention.set_spec(record.node, attention.spec_of(record.node).edited(by="mover", store=Elsewhere()))

    with pytest.raises(Exception, match=r"'mover' \(store\).*composed: store elsewhere"):
        compiled(model_of("sdpa"), x, edit=edit)


def test_a_registered_lowering_is_preferred(x):
    mine = attention.Lowering("mine", lambda spec, node: None, COMPOSED.run)

    def edit(record):
        attention.set_spec(record.node, attention.spec_of(record.node).edited(by="mover", store=Elsewhere()))

    _, _, out, want = compiled(model_of("sdpa"), x, edit=edit, lowerings=Lowerings(mine))
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)
