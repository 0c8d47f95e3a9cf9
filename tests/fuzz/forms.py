"""The grammar's smaller forms: linears, norms, activations, views, casts, writes in place, conditionals."""

from __future__ import annotations

import torch

from tests.fuzz.program import Line
from tests.fuzz.writer import DTYPES, Impossible, Writer, is_feature

WIDTHS = (8, 16, 32)
ACTIVATIONS = (
    "F.relu({0})", "torch.relu({0})", "{0}.relu()", "F.gelu({0})", 'F.gelu({0}, approximate="tanh")', "F.silu({0})",
    "{0} * torch.sigmoid({0})", "torch.tanh({0})", "F.softplus({0})", "F.leaky_relu({0}, 0.1)", "F.hardswish({0})",
    "{0}.clamp(-1, 1)", "F.elu({0})", "torch.square(F.relu({0}))", "F.softmax({0}, dim=-1)", "{0}.sigmoid()",
    "0.5 * {0} * (1 + torch.tanh(0.79788456 * ({0} + 0.044715 * {0} ** 3)))",
)  # fmt: skip


def linear(w: Writer, x: str | None = None, out: int | None = None) -> str:
    """One of the ways to multiply by a weight; returns the result."""
    x = x or w.hidden()
    v = w[x]
    size, out, kind = v.shape[-1], out or w.one_of(*WIDTHS), v.dtype
    if not is_feature(size):
        raise Impossible("a weight cannot follow a dynamic size")
    typed, bias = w.dtype_argument(kind), w.maybe()
    way = w.rng.randrange(14)
    if way < 4:
        layer = w.attribute(f"nn.Linear({size}, {out}{'' if bias else ', bias=False'}{typed})")
        return w.let(f"{layer}({x})")
    if way == 4:  # a weight that another layer has
        layers = [n for n, m in w.owner.named_children() if isinstance(m, torch.nn.Linear) and m.in_features == size]
        layers = [n for n in layers if getattr(w.owner, n).weight.dtype == kind]
        if not layers:
            raise Impossible("no layer to share")
        shared = getattr(w.owner, name := w.rng.choice(layers))
        if w.maybe():
            return w.let(f"self.{name}({x})")
        layer = w.attribute(f"nn.Linear({size}, {shared.out_features}{typed})")
        w.construct(f"{layer}.weight = self.{name}.weight")
        return w.let(f"{layer}({x})")
    if way == 5:
        return w.let(f"nn.functional.linear(input={x}, weight={w.weight(out, size, dtype=kind)})")
    b = w.weight(out, dtype=kind) if bias else None
    if way == 6:
        return w.let(f"F.linear({x}, {w.weight(out, size, dtype=kind)}{f', {b}' if b else ''})")
    if way == 7:
        flat = w.let(f"{x}.reshape(-1, {size})")
        made = w.let(f"torch.addmm({w.weight(out, dtype=kind)}, {flat}, {w.weight(size, out, dtype=kind)})")
        lead = ", ".join(w.dim(x, axis) for axis in range(v.dim() - 1))
        return w.let(w.one_of(f"{made}.view({lead}, {out})", f"{made}.reshape({lead}, -1)"))
    if way == 8 and v.dim() == 3:  # a convolution of width one
        conv = w.attribute(f"nn.Conv1d({size}, {out}, 1{'' if bias else ', bias=False'}{typed})")
        return w.let(f"{conv}({x}.transpose(1, 2)).transpose(1, 2)")
    weight = w.weight(*((out, size) if way in (10, 11, 12) else (size, out)), dtype=kind)
    text = {
        9: f"torch.matmul({x}, {weight})",
        10: f"{x}.matmul({weight}.T)",
        11: f'torch.einsum("...i,oi->...o", {x}, {weight})',
        12: f"F.linear({x}, {weight} * 0.5)",
    }.get(way, f"{x} @ {weight}")
    return w.let(f"{text} + {b}" if b else text)


def norm(w: Writer, x: str | None = None) -> str:
    """One of the ways to write LayerNorm and RMSNorm."""
    x = x or w.hidden()
    size, kind = w[x].shape[-1], w[x].dtype
    typed = w.dtype_argument(kind)
    way = w.rng.randrange(9)
    if way == 0:
        return w.let(f"{w.attribute(f'nn.LayerNorm({size}{typed})')}({x})")
    if way == 1:
        return w.let(f"{w.attribute(f'nn.RMSNorm({size}, eps=1e-6{typed})')}({x})")
    if way == 2:
        weight, bias = (w.weight(size, dtype=kind) for _ in range(2))
        return w.let(w.one_of(f"F.layer_norm({x}, ({size},))", f"F.layer_norm({x}, ({size},), {weight}, {bias}, 1e-5)"))
    if way == 3:
        return w.let(f"F.rms_norm({x}, ({size},), weight={w.weight(size, dtype=kind)})")
    if way == 4:
        return w.let(f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6) * {w.weight(size, dtype=kind)}")
    if way == 5:
        up = w.let(f"{x}.to(torch.float32)")
        made = w.let(f"{up} * torch.rsqrt({up}.pow(2).mean(-1, keepdim=True) + 1e-6)")
        return w.let(f"{w.weight(size, dtype=kind)} * {made}.to({x}.dtype)")
    if way == 6:
        return w.let(f"{x} / ({x}.norm(dim=-1, keepdim=True) + 1e-6)")
    if way == 7:
        centred = w.let(f"{x} - {x}.mean(-1, keepdim=True)")
        return w.let(f"{centred} / torch.sqrt({centred}.pow(2).mean(dim=-1, keepdim=True) + 1e-5)")
    return w.let(f"F.normalize({x}, dim=-1)")


def activation(w: Writer, x: str | None = None) -> str:
    return w.let(w.rng.choice(ACTIVATIONS).format(x or w.hidden()))


def mlp(w: Writer, x: str | None = None) -> str:
    """Two linears around an activation, gated or not."""
    x = x or w.stream()
    size, wide = w[x].shape[-1], w.one_of(16, 32)
    way = w.rng.randrange(4)
    if way == 0:
        inner = activation(w, linear(w, x, wide))
    elif way == 1:
        gate, up = linear(w, x, wide), linear(w, x, wide)
        inner = w.let(f"{activation(w, gate)} * {up}")
    elif way == 2:
        both = linear(w, x, 2 * wide)
        cut = f"{both}.chunk(2, dim=-1)" if w.maybe() else f"{both}.split({wide}, -1)"
        w.do(f"gate, up = {cut}")
        inner = w.let("F.silu(gate) * up")
    else:
        text = f"nn.Sequential(nn.Linear({size}, {wide}), nn.GELU(), nn.Dropout(0.1), nn.Linear({wide}, {size}))"
        return w.let(f"{w.attribute(text)}({x})")
    return linear(w, inner, size)


def residual(w: Writer) -> str:
    x = w.hidden()
    y = w.like(x)
    ways = (f"{x} + {y}", f"torch.add({x}, {y}, alpha=0.5)", f"{y} + 0.5 * {x}", f"{x}.add({y})", f"{x} - {y} * 0.3")
    return w.let(w.rng.choice(ways))


def combine(w: Writer) -> str:
    """Arithmetic of two values that broadcast."""
    x = w.hidden()
    scale, size = w.weight(w[x].shape[-1]), w[x].shape[-1]
    table = w.attribute(f"torch.linspace(-1, 1, {size})", "buffer")
    ways = (
        f"{x} * {scale}", f"{x} * {table}", f"{x} * {x}.mean(-1, keepdim=True)", f"torch.maximum({x}, {x}.flip(-1))",
        f"torch.where({x} > 0, {x}, {x} * 0.1)", f"{x} * 0.5 + 1", f"-{x}", f"torch.lerp({x}, {x} * 2, 0.25)",
        f"{x} / (1 + {x}.abs())", f"torch.cat([{x}, {x} * 2], -1)", f"torch.stack([{x}, {x} + 1]).sum(0)",
    )  # fmt: skip
    return w.let(w.rng.choice(ways))


def view(w: Writer) -> str:
    """Other shapes of the same values."""
    x = w.pick(lambda v: v.is_floating_point() and v.dim() >= 2)
    v, half = w[x], w[x].shape[-1] // 2
    ways = [
        f"{x}.transpose(0, 1)", f"{x}.transpose(-1, -2)", f"{x}.mT", f"{x}.unsqueeze(1)", f"{x}.contiguous()", f"{x}.clone()",
        f"{x}.flatten(0, 1)", f"{x}[:, -1:]", f"{x}[:, 0]", f"{x}[..., :{half}]", f"{x}.narrow(-1, 0, {half})", f"{x}[None]",
        f"{x}.roll(1, 1)", f"{x}.flip(1)", f"{x}.detach()", f"{x}[...]", f"{x}.view({x}.shape)", f"{x}[:, ::2]",
        f"{x}.reshape({w.dim(x, 0)}, -1)", f"{x}.expand(2, {', '.join(['-1'] * v.dim())})", f"torch.movedim({x}, 0, 1)",
        f"{x}.unbind(0)[0]", f"{x}.chunk(2, -1)[1]", f"{x}.sum(1)", f"{x}.mean(1, keepdim=True)", f"{x}.amax(-1, keepdim=True)",
        f"{x}.cumsum(1)", f"F.pad({x}, (0, 0, 1, 0))",
    ]  # fmt: skip
    if v.dim() == 3:
        ways += [
            f"{x}.permute(1, 0, 2)",
            f"{x}.reshape(-1, {w.dim(x, 2)})",
            f"{x}.view({w.dim(x, 0)}, {w.dim(x, 1)}, 2, -1)",
        ]
        ways += [f"{x}.transpose(1, 2).contiguous().transpose(1, 2)", f"{x}.permute(0, 2, 1).reshape({x}.shape[0], -1)"]
    if v.dim() == 4:
        ways += [
            f"{x}.flatten(2)",
            f"{x}.squeeze(1)",
            f"{x}[:, 0]",
            f"{x}.permute(0, 2, 1, 3)",
            f"{x}.transpose(1, 2).flatten(2)",
        ]
    if v.dim() == 2:
        ways += [f"{x}.t()", f"{x}[:, None]", f"{x}.unsqueeze(0)"]
    return w.let(w.rng.choice(ways))


def cast(w: Writer) -> str:
    x = w.hidden()
    y = w.pick(lambda v: v.is_floating_point(), 0.2)
    named = w.one_of(*DTYPES.values(), "torch.float32")
    ways = (f"{x}.to({named})", f"{x}.float()", f"{x}.bfloat16()", f"{x}.type_as({y})", f"{x}.to({y}.dtype)", f"{x}.to({y})",
            f"{x}.to(dtype={named})", f"{x}.double()", f"{x}.type({named})", f"{x}.to({named}).to({x}.dtype)")  # fmt: skip
    return w.let(w.rng.choice(ways))


def write(w: Writer) -> None:
    """A write in place: to a copy, through a view, to an input, to a buffer."""
    way = w.rng.randrange(10)
    if way < 5:
        x = w.let(f"{w.hidden()}.clone()")
    elif way < 8:  # may be an input, or a view of anything
        x = w.hidden()
    else:
        size, kind = w.one_of(*WIDTHS), w.one_of("", "", ", dtype=torch.bfloat16")
        x = w.attribute(f"torch.zeros(4, {size}{kind})", "buffer")
        source = w.pick(lambda v: v.is_floating_point() and v.shape[-1:] == (size,) and v.numel() > 0)
        mean = f"{source}.reshape(-1, {size}).mean(0)"
        w.do(
            w.one_of(
                f"{x}.add_({mean})",
                f"{x}[1:3] = {mean}",
                f"{x}[0].copy_({mean})",
                f"{x} += 1",
                f"{x}.mul_(0.5).add_({mean})",
            )
        )
        w.let(w.one_of(f"{x} * 2", f"{x}.sum(0)", f"{source} + {x}[1]"))
        return
    if w.maybe(0.3):
        x = w.let(
            w.one_of(
                f"{x}.view({x}.shape)", f"{x}[:, :1]", f"{x}.transpose(0, 1)", f"{x}[0]", f"{x}.detach()", f"{x}[...]"
            )
        )
    y = w.like(x) if w.maybe() else f"{x}.detach().clone()"
    ways = (
        f"{x}.add_(1)", f"{x}.add_({y}, alpha=0.5)", f"{x}.mul_({y})", f"{x} += {y}", f"{x} *= 0.5", f"{x}[0] = 0", f"{x}[:, 0] = 1.0",
        f"{x}[:, :2].copy_({y}[:, :2] * 2)", f"{x}.masked_fill_({y} > 0, 0.25)", f"{x}.relu_()", f"F.relu({x}, inplace=True)",
        f"{x}[..., :4] = {y}[..., -4:]", f"{x}.copy_({y})", f"{x}.zero_()", f"{x}.clamp_(min=-0.5)", f"{x}.sub_({y}.mean())",
        f"{x}.index_fill_(0, torch.tensor([0]), 2.0)", f"{x}[:, -1:] += 1", f"{x}.fill_diagonal_(0)", f"{x}.unsqueeze_(0)", f"{x}.t_()",
        f"{x}.squeeze_(0)",
    )  # fmt: skip
    w.do(w.rng.choice(ways))


def condition(w: Writer) -> str:
    """A branch on a shape, a dtype or a mode, which Dynamo takes when it traces."""
    x = w.hidden()
    test = w.one_of(
        f"{x}.shape[0] > 1", f"{x}.shape[1] >= 4", f"{x}.shape[0] % 2 == 0", f"{x}.dtype == torch.float32", "self.training",
        f"{x}.dim() == 3", f"{x}.numel() > 100", f"{x}.is_contiguous()", f"{x}.shape[-1] == {x}.shape[1]", f"{x}.requires_grad",
    )  # fmt: skip
    w.count += 1
    name = f"v{w.count}"
    one, two = w.rng.sample(ACTIVATIONS, 2)
    w.region(f"if {test}:", [Line(f"{name} = {one.format(x)}")], [Line(f"{name} = {two.format(x)} + {x}")])
    return name


def indices(w: Writer) -> str:
    """An embedding of integers, and maybe its weight once more as an output head."""
    ids = w.pick(lambda v: v.dtype == torch.int64 and v.dim() == 2)
    size = w.one_of(*WIDTHS)
    table = w.attribute(f"nn.Embedding(12, {size})")
    made = w.let(w.one_of(f"{table}({ids})", f"F.embedding({ids}, {table}.weight)", f"{table}.weight[{ids}]"))
    if w.maybe(0.4):
        head = w.attribute(f"nn.Linear({size}, 12, bias=False)")
        w.construct(f"{head}.weight = {table}.weight")
        return w.let(f"{head}({norm(w, made)})")
    return made


def made_inside(w: Writer) -> str:
    """A tensor that the graph itself makes, of a size that may be dynamic."""
    x = w.hidden()
    last = w[x].shape[-1]
    text = w.one_of(
        f"torch.arange({w.dim(x, 1)}, dtype={x}.dtype)[:, None].expand(-1, {last})", f"torch.zeros_like({x})", f"{x}.new_ones({last})",
        f"torch.full(({last},), 0.5)", f"torch.eye({last})[0]", f"torch.tensor([0.5] * {last})", f"torch.ones({x}.shape[-1], device={x}.device)",
    )  # fmt: skip
    made = w.let(text)
    return w.let(f"{x} * {made}" if w[x].dim() == 2 or w[made].dim() == 1 else f"{x} + {made}")
