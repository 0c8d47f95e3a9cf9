"""The grammar's attentions: projections, layouts of heads, masks, grouped queries, and the product written in many ways."""

from __future__ import annotations

import torch

from tests.fuzz.forms import linear, norm
from tests.fuzz.writer import Impossible, Writer, is_feature


def attention(w: Writer, x: str | None = None) -> str:
    """Queries of one stream on keys and values of the same or another."""
    x = x or w.stream()
    v = w[x]
    if v.dim() != 3 or not is_feature(v.shape[-1]):
        raise Impossible("not (batch, tokens, features)")
    if w.maybe(0.06) and v.dtype == torch.float32:
        return _module(w, x)
    heads, d = w.one_of(1, 2, 4), w.one_of(4, 8)
    kv = w.one_of(heads, heads, heads, max(1, heads // 2), 1)
    other = (
        x
        if w.maybe(0.75)
        else w.pick(
            lambda t: t.dim() == 3 and t.dtype == v.dtype and t.shape[0] == v.shape[0] and is_feature(t.shape[-1]), 0.1
        )
    )
    q, k, val = _projected(w, x, other, heads, kv, d)
    if w.maybe(0.2):
        q, k = norm(w, q), norm(w, k)
    if w.maybe(0.25):
        q, k = _rotated(w, q, d), _rotated(w, k, d)
    grouped = heads != kv
    enable = grouped and w.maybe(0.35)
    if grouped and not enable:
        k, val = (_repeated(w, n, heads // kv, kv, d) for n in (k, val))
    if not enable and w.maybe(0.12):  # heads folded into the batch, as bmm wants it
        lead = w.dim(q, 0)
        q, k, val = (w.let(f"{n}.reshape(-1, {w.dim(n, 2)}, {d})") for n in (q, k, val))
        made = _product(w, q, k, val, d, enable)
        made = w.let(f"{made}.view({lead}, {heads}, -1, {d})")
    else:
        made = _product(w, q, k, val, d, enable)
    size = heads * d
    merge = w.one_of(
        f"{made}.transpose(1, 2).reshape({w.dim(x, 0)}, {w.dim(x, 1)}, {size})", f"{made}.transpose(1, 2).contiguous().view({w.dim(x, 0)}, -1, {size})",
        f"{made}.permute(0, 2, 1, 3).flatten(2)", f"{made}.movedim(1, 2).reshape(*{x}.shape[:2], -1)", f"{made}.transpose(1, 2).flatten(-2)",
    )  # fmt: skip
    made = w.let(merge)
    made = linear(w, made, v.shape[-1]) if w.maybe(0.8) else made
    return w.let(f"{x} + {made}") if w[made].shape == v.shape and w.maybe() else made


def _module(w: Writer, x: str) -> str:
    size = w[x].shape[-1]
    if w.maybe():
        layer = w.attribute(f"nn.MultiheadAttention({size}, 2, batch_first=True)")
        w.do(f"mixed, shares = {layer}({x}, {x}, {x}, need_weights={w.one_of(True, False)})")
        return w.let(f"{x} + mixed")
    layer = w.attribute(
        f"nn.TransformerEncoderLayer({size}, 2, 16, batch_first=True, norm_first={w.one_of(True, False)})"
    )
    return w.let(f"{layer}({x})")


def _projected(w: Writer, x: str, other: str, heads: int, kv: int, d: int) -> list[str]:
    """(batch, heads, tokens, d) of each."""
    if x == other and w.maybe(0.35):
        if heads == kv and w.maybe(0.4):
            both = w.let(f"{linear(w, x, 3 * heads * d)}.reshape({w.dim(x, 0)}, {w.dim(x, 1)}, 3, {heads}, {d})")
            ways = (
                f"{both}.permute(2, 0, 3, 1, 4)",
                f"{both}.permute(2, 0, 3, 1, 4).unbind(0)",
                f"{both}.transpose(1, 3).unbind(2)",
            )
            w.do(f"q, k, v = {w.rng.choice(ways)}")
            return [w.let(n) for n in ("q * 1", "k", "v")]
        sizes = (heads * d, kv * d, kv * d)
        both = linear(w, x, sum(sizes))
        if heads == kv and w.maybe():
            w.do(f"q, k, v = {both}.chunk(3, dim=-1)")
        else:
            w.do(f"q, k, v = {both}.split([{', '.join(map(str, sizes))}], dim=-1)")
        flat = ["q", "k", "v"]
    else:
        flat = [linear(w, x, heads * d), linear(w, other, kv * d), linear(w, other, kv * d)]
    made = []
    way = w.rng.randrange(4)
    for name, n in zip(flat, (heads, kv, kv), strict=True):
        b, t = w.dim(name, 0), w.dim(name, 1)
        text = (
            f"{name}.view({b}, {t}, {n}, {d}).transpose(1, 2)",
            f"{name}.reshape({b}, -1, {n}, {d}).permute(0, 2, 1, 3)",
            f"{name}.unflatten(-1, ({n}, {d})).transpose(1, 2)",
            f"{name}.view(*{name}.shape[:-1], -1, {d}).movedim(2, 1)",
        )[way]
        made.append(w.let(text))
    return made


def _rotated(w: Writer, x: str, d: int) -> str:
    """Rotary positions."""
    angles = w.let(f"torch.arange({w.dim(x, 2)}, device={x}.device)[:, None] * 0.1 ** torch.arange({d // 2})")
    table = w.let(f"torch.cat([{angles}, {angles}], -1).to({x}.dtype)")
    turned = w.let(f"torch.cat([-{x}[..., {d // 2}:], {x}[..., :{d // 2}]], dim=-1)")
    return w.let(f"{x} * {table}.cos() + {turned} * {table}.sin()")


def _repeated(w: Writer, x: str, times: int, kv: int, d: int) -> str:
    way = w.rng.randrange(3)
    if way == 0:
        return w.let(f"{x}.repeat_interleave({times}, dim=1)")
    b, t = w.dim(x, 0), w.dim(x, 2)
    if way == 1:
        wide = w.let(f"{x}[:, :, None, :, :].expand({b}, {kv}, {times}, {t}, {d})")
        return w.let(f"{wide}.reshape({b}, {kv * times}, {t}, {d})")
    return w.let(f"{x}.unsqueeze(2).expand(-1, -1, {times}, -1, -1).flatten(1, 2)")


def _mask(w: Writer, q: str, k: str) -> str | None:
    """A boolean mask, True where a query sees a key, that broadcasts to the scores; one may have rows that see nothing."""
    rows, keys = w.dim(q, -2), w.dim(k, -2)
    same = w[q].shape[-2] == w[k].shape[-2]
    given = [n for n, t in w.values.items() if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
    ways = [
        f"torch.ones({rows}, {keys}, dtype=torch.bool).tril()",
        f"torch.arange({rows})[:, None] >= torch.arange({keys})",
    ]
    ways += [f"torch.arange({keys})[None, :] < 3", f"(torch.arange({rows})[:, None] - torch.arange({keys})).abs() < 2"]
    ways += [f"~torch.triu(torch.ones({rows}, {keys}), diagonal=1).bool()"] if same else []
    if w[q].dim() == 4:
        ways += [f"{n}[:, None, None, :]" for n in given if w[n].dim() == 2 and w[n].shape[-1] == w[k].shape[-2]] * 2
    ways += [n for n in given if w[n].dim() == 4 and w[n].shape[-2:] == (w[q].shape[-2], w[k].shape[-2])] * 3
    return w.let(w.rng.choice(ways))


def _product(w: Writer, q: str, k: str, v: str, d: int, enable: bool) -> str:
    written = not enable and w.maybe(0.55)
    return _written(w, q, k, v, d) if written else _fused(w, q, k, v, d, enable)


def _fused(w: Writer, q: str, k: str, v: str, d: int, enable: bool) -> str:
    call = w.one_of("F.scaled_dot_product_attention", "torch.nn.functional.scaled_dot_product_attention")
    scale = w.one_of("", "", ", scale=0.3", f", scale={d}**-0.5", ", scale=1.0")
    more = scale + (", enable_gqa=True" if enable else w.one_of("", "", ", enable_gqa=False"))
    way = w.rng.randrange(6)
    if way == 0:
        return w.let(f"{call}({q}, {k}, {v}{more})")
    if way == 1:
        return w.let(f"{call}({q}, {k}, {v}{w.one_of(', None, 0.0, True', ', is_causal=True')}{more})")
    if way == 2:
        return w.let(f"{call}({q}, {k}, value={v}, dropout_p=0.0, attn_mask=None{more})")
    mask = _mask(w, q, k)
    if way == 3:
        mask = w.let(
            w.one_of(
                f"torch.where({mask}, 0.0, -1e4).to({q}.dtype)",
                f"(~{mask}).to({q}.dtype) * -10000.0",
                f"torch.zeros_like({mask}, dtype={q}.dtype).masked_fill({mask}.logical_not(), float('-inf'))",
            )
        )
    return w.let(f"{call}({q}, {k}, {v}{w.one_of(f', attn_mask={mask}', f', {mask}', f', {mask}, 0.0, False')}{more})")


def _written(w: Writer, q: str, k: str, v: str, d: int) -> str:
    """Softmax of a product, step by step."""
    scale = w.one_of(f"* {d} ** -0.5", f"/ {d} ** 0.5", "* 0.3", f"/ math.sqrt({d})", None, "first")
    if scale == "first":
        q, scale = w.let(w.one_of(f"{q} * {d} ** -0.5", f"{q} / {d} ** 0.5")), None
    folded = w[q].dim() == 3
    turned = w.let(w.one_of(f"{k}.transpose(-1, -2)", f"{k}.mT", f"{k}.transpose(-2, -1)"))
    ways = [f"{q} @ {turned}", f"torch.matmul({q}, {turned})", f"{q}.matmul({turned})"]
    ways += (
        [f"torch.bmm({q}, {turned})"] * 3
        if folded
        else [f'torch.einsum("bhqd,bhkd->bhqk", {q}, {k})', f"({k} @ {q}.transpose(-1, -2)).transpose(-1, -2)"]
    )
    scores = w.let(w.rng.choice(ways))
    if scale is not None:
        scores = w.let(
            f"{scores} {scale.replace(f'math.sqrt({d})', f'torch.sqrt(torch.tensor({d}.0)).to({scores}.dtype)')}"
        )
    if w.maybe(0.12):
        scores = w.let(f"torch.tanh({scores} / 5) * 5")
    scores = _masked(w, scores, q, k)
    ways = [
        f"torch.softmax({scores}, dim=-1)",
        f"F.softmax({scores}, -1)",
        f"{scores}.softmax(-1)",
        f"F.softmax({scores}, dim=-1, dtype=torch.float32).to({v}.dtype)",
    ]
    if w.maybe(0.15):
        up = w.let(f"torch.exp({scores} - {scores}.amax(-1, keepdim=True))")
        ways = [f"{up} / {up}.sum(-1, keepdim=True)"]
    shares = w.let(w.rng.choice(ways))
    if w.maybe(0.2):
        shares = w.let(
            w.one_of(f"F.dropout({shares}, 0.1, training=self.training)", f"{shares}.nan_to_num()", f"{shares} * 1.0")
        )
    ways = [f"{shares} @ {v}", f"torch.matmul({shares}, {v})"]
    ways += [f"torch.bmm({shares}, {v})"] if folded else [f'torch.einsum("bhqk,bhkd->bhqd", {shares}, {v})']
    return w.let(w.rng.choice(ways))


def _masked(w: Writer, scores: str, q: str, k: str) -> str:
    way = w.rng.randrange(9)
    if way < 2:
        return scores
    if way == 2 and w[scores].dim() == 4:
        return w.let(f"{scores} + {w.weight(w[scores].shape[1], 1, 1)}")
    mask = _mask(w, q, k)
    low = w.one_of("float('-inf')", f"torch.finfo({scores}.dtype).min", "-1e9", "-10000.0")
    if way == 3:
        return w.let(f"torch.where({mask}, {scores}, {low})")
    if way == 4:
        return w.let(f"{scores}.masked_fill(~{mask}, {low})")
    if way == 5:
        w.do(f"{scores}.masked_fill_({mask} == 0, {low})")
        return scores
    if way == 6:
        return w.let(f"{scores} + (1.0 - {mask}.to({scores}.dtype)) * -10000.0")
    bias = w.let(f"torch.zeros_like({mask}, dtype={scores}.dtype).masked_fill(~{mask}, {low})")
    if way == 7:
        w.do(f"{scores} += {bias}")
        return scores
    return w.let(f"{scores} + {bias}")
