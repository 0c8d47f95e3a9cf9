"""Axes against models captured at two sizes, on models whose layout is known, and rule by rule."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from accelpass.ir import attention
from accelpass.ir.analyses.axes.axes import Axes, Axis, axes
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.capture import from_export
from accelpass.ir.core.graph import aten, fake_mode, is_call, placeholders, value
from accelpass.ir.core.program import Program
from tests.ir.axis_variants import built, captured, growth, matched, pair
from tests.sweep import sweep

TOKENS = ("token", "frame", "height", "width")
QUICK = ("causal_lm/llama", "image/vit")
SWEEP = (
    *("causal_lm/mixtral", "diffusion/wan", "diffusion/flux", "diffusion/dit"),
    *("causal_lm/gpt2", "causal_lm/qwen2_moe", "causal_lm/gemma2", "causal_lm/opt", "causal_lm/bloom"),
    *("masked_lm/bert", "masked_lm/mpnet", "image/swin", "image/deit", "image/convnext", "image/resnet"),
    *("diffusion/sd3", "diffusion/pixart", "diffusion/cogvideox", "diffusion/ltx_video"),
)


def calls(program: Program, *targets: object) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, *targets)]


def first_input(program: Program, name: str) -> fx.Node:
    sources = {n: getattr(getattr(n, "_dynamo_source", None), "name", n.name) for n in placeholders(program.gm)}
    return next(n for n, source in sources.items() if source == name or source.endswith(f"['{name}']"))


def names(found: Axes, node: fx.Node) -> list[str]:
    return [dim.name for dim in found.of(node)]


def only(found: Axes, node: fx.Node, dim: int) -> Axis:
    (axis,) = found.of(node)[dim].leaves
    return axis


# --- what changes with the batch and with the tokens


@pytest.mark.parametrize("key", sweep(*QUICK, *SWEEP, fast=len(QUICK)))
def test_what_grows_has_the_axis_that_grew(key: str):
    """The second capture knows which dimensions grow; the analysis sees the first one alone."""
    one, two = pair(key)
    found = one.analysis(axes)
    changed = covered = 0
    wrong, sizes = [], defaultdict(set)
    for a, b in matched(one, two):
        for dim, size, batch, token in growth(a, b):
            here = found.of(a)[dim]
            has_token = any(here.has(name) for name in TOKENS)
            changed += batch + token
            covered += (batch and here.has("batch")) + (token and has_token)
            if here.has("batch") and not batch:
                wrong.append((a.name, dim, here.name))
            if len(here.leaves) == 1:
                sizes[here.leaves[0]].add(size)
    assert not wrong
    assert not found.conflicts
    assert not {axis: found_sizes for axis, found_sizes in sizes.items() if len(found_sizes) > 1}, "not one axis"
    assert changed and covered / changed >= 0.95, f"{covered} of {changed}"


# --- models whose layout is known


def test_llama_names():
    program = built("causal_lm/llama")
    found = program.analysis(axes)
    node = next(n for n in program.graph.nodes if is_attention(n))
    assert names(found, node) == ["batch", "head*head", "token", "channel"]
    assert names(found, node.args[1]) == ["batch", "head", "token", "channel"]
    assert found.of(node)[1].leaves[0] is only(found, node.args[1], 1), "query heads are key heads times a group"
    ids = first_input(program, "input_ids")
    token, batch = only(found, ids, 1), only(found, ids, 0)
    carriers = {n for n, _ in found.carriers(token)}
    assert {node, *node.args[:2], *calls(program, aten.cos, aten.sin), *calls(program, aten.embedding)} <= carriers
    assert all(found.same(found.of(n)[1], found.of(ids)[1]) for n in calls(program, aten.linear))
    assert batch in found.named("batch") and token in found.named("token")
    (logits,) = (n for n in calls(program, aten.linear) if any(u.op == "output" for u in n.users))
    assert names(found, logits)[-1] == "vocabulary"


def test_vit_patches_and_class_token():
    program = built("image/vit")
    found = program.analysis(axes)
    (patches,) = calls(program, aten.conv2d)
    assert names(found, patches) == ["batch", "channel", "height", "width"]
    (joined,) = calls(program, aten.cat)
    assert names(found, joined) == ["batch", "token", "channel"]
    (part,) = (p for p in found.parts if p.whole == found.of(joined)[1].leaves and p.part)
    assert part.part == found.of(patches)[2].leaves + found.of(patches)[3].leaves
    assert (part.start, part.size) == (1, value(joined).shape[1] - 1)
    assert found.of(patches)[2].is_("token"), "attention runs over it"


def test_mixtral_experts():
    program = built("causal_lm/mixtral")
    found = program.analysis(axes)
    stacks = [n for n in placeholders(program.gm) if "experts" in (program.tensors.path(n) or "")]
    assert stacks and all(names(found, n) == ["expert", "channel", "channel"] for n in stacks)
    assert all(names(found, n.args[0])[-1] == "expert" for n in calls(program, aten.topk))


def test_wan_frames():
    program = built("diffusion/wan")
    found = program.analysis(axes)
    (patches,) = calls(program, aten.conv3d)
    assert names(found, patches) == ["batch", "channel", "frame", "height", "width"]
    node = next(n for n in program.graph.nodes if is_attention(n))
    tokens = found.of(node)[2]
    assert tokens.name == "frame*height*width" and tokens.is_("token")
    assert not found.same(found.of(patches)[3], found.of(patches)[4]), "a square image has two axes"


def test_flux_joint_tokens():
    program = built("diffusion/flux")
    found = program.analysis(axes)
    node = next(n for n in program.graph.nodes if is_attention(n))
    joint = found.of(node)[2]
    image, text = (only(found, first_input(program, f"{n}hidden_states"), 1) for n in ("", "encoder_"))
    assert joint.is_("token") and image.name == text.name == "token"
    assert len({joint.leaves[0], image, text}) == 3
    parts = {p.part for p in found.parts if p.whole == joint.leaves}
    assert {(image,), (text,)} <= parts


@cache
def llama_with_cache(kind: str) -> Program:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    if kind == "static":
        cache.early_initialization(2, 2, 8, torch.float32, "cpu")
    return captured(model, input_ids=torch.randint(64, (2, 5)), past_key_values=cache, use_cache=True)


def test_dynamic_cache_keys_have_the_token_axis():
    program = llama_with_cache("dynamic")
    found = program.analysis(axes)
    (node,) = (n for n in program.graph.nodes if is_attention(n))
    token = only(found, first_input(program, "input_ids"), 1)
    assert only(found, node.args[1], 2) is token, "an empty cache adds nothing"
    assert only(found, node, 2) is token


def test_static_cache_is_another_token_axis():
    program = llama_with_cache("static")
    found = program.analysis(axes)
    (node,) = (n for n in program.graph.nodes if is_attention(n))
    token, kept = only(found, node, 2), only(found, node.args[1], 2)
    assert token is only(found, first_input(program, "input_ids"), 1)
    assert kept.name == "token" and kept is not token and kept.size == 16
    for write in calls(program, aten.index_copy_):
        cache, _, positions, new = write.args
        assert only(found, cache, 2) is kept
        assert only(found, positions, 0) is token and only(found, new, 2) is token
    masks = [n for n, dim in found.carriers(kept) if found.of(n)[dim - 1].is_("token") and n is not node]
    assert masks, "the mask has queries and keys"


# --- rule by rule


class Grouped(nn.Module):
    def forward(self, q, k, v):
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape[0], 4, -1, 8) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("insert", [False, True])
def test_repeated_keys_split_query_heads(insert: bool):
    program = captured(
        Grouped(), insert, q=torch.randn(3, 4, 6, 8), k=torch.randn(3, 2, 5, 8), v=torch.randn(3, 2, 5, 8)
    )
    found = axes(program)
    q, k, v = (first_input(program, name) for name in "qkv")
    assert names(found, q) == ["batch", "head*head", "token", "channel"]
    assert names(found, k) == ["batch", "head", "token", "channel"]
    assert found.of(q)[1].leaves[0] is only(found, k, 1) is only(found, v, 1)
    assert only(found, q, 2) is not only(found, k, 2)
    out = next(n for n in program.graph.nodes if n.op == "output").args[0][0]
    assert names(found, out) == ["batch", "token", "head*head*channel"]


class Joined(nn.Module):
    def forward(self, x, y):
        both = torch.cat([x, y], 1)
        return both[:, :3] * 2, torch.cat([x + 1, y], 1), both.view(2, 2, 4, 6), torch.flip(both, [1])


def test_parts_of_a_concatenation_are_found_again():
    program = captured(Joined(), x=torch.randn(2, 3, 6), y=torch.randn(2, 5, 6))
    found = axes(program)
    x, y = (first_input(program, name) for name in "xy")
    first, again, _, flipped = next(n for n in program.graph.nodes if n.op == "output").args[0]
    assert found.same(found.of(first)[1], found.of(x)[1])
    assert not found.same(found.of(x)[1], found.of(y)[1])
    whole = calls(program, aten.cat)[0]
    assert found.same(found.of(whole)[1], found.of(again)[1]) and found.same(found.of(whole)[1], found.of(flipped)[1])
    assert len(found.of(whole)[1].leaves) == 2, "split by the view"


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):  # (batch, 6, 6, 4): rows and columns take their positions from one table
        return x + self.table[: x.shape[1], None] + self.table[: x.shape[2]]


def test_height_and_width_of_a_square_stay_two_axes():
    program = captured(Square(), x=torch.randn(2, 6, 6, 4))
    found = axes(program)
    x = first_input(program, "x")
    assert not found.same(found.of(x)[1], found.of(x)[2])


class Contradiction(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 16)

    def forward(self, ids):
        x = self.words(ids).mT.unsqueeze(1)  # the tokens stand where attention has channels
        return F.scaled_dot_product_attention(x, x, x)


def test_two_names_are_a_conflict():
    program = captured(Contradiction(), ids=torch.randint(32, (2, 8)))
    found = axes(program)
    (conflict,) = found.conflicts
    assert {name for name, _ in conflict.sites} == {"token", "channel"}
    assert conflict.axis.name is None and conflict.axis is only(found, first_input(program, "ids"), 1)
    assert "conflict" in str(found)


class Inverted(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x) + 1


def test_unknown_operators_are_listed_and_give_new_axes():
    program = captured(Inverted(), x=torch.randn(3, 4, 4))
    found = axes(program)
    assert list(found.unknown_ops.values()) == [1]
    out = next(n for n in program.graph.nodes if n.op == "output").args[0][0]
    assert names(found, out) == ["?", "?", "?"]
    assert not any(found.same(a, b) for a, b in zip(found.of(out), found.of(first_input(program, "x")), strict=True))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(64, 16)

    def forward(self, ids):
        return self.words(ids), self.places(torch.arange(ids.shape[1]))


def test_a_range_over_a_count_walks_the_counted_axis():
    sizes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("words")},)
    exported = torch.export.export(Positions().eval(), (torch.randint(32, (3, 8)),), dynamic_shapes=sizes)
    program = from_export(exported)
    guards = len(fake_mode(program.gm).shape_env.guards)
    found = axes(program)
    (places,) = calls(program, aten.arange)
    assert found.same(found.of(places)[0], found.of(first_input(program, "ids"))[1])
    assert len(fake_mode(program.gm).shape_env.guards) == guards


def test_symbolic_sizes_split_and_merge_without_guards():
    program = captured(
        Grouped(), dynamic=True, q=torch.randn(3, 4, 6, 8), k=torch.randn(3, 2, 5, 8), v=torch.randn(3, 2, 5, 8)
    )
    guards = len(fake_mode(program.gm).shape_env.guards)
    found = axes(program)
    (node,) = (n for n in program.graph.nodes if is_attention(n) or is_call(n, aten.scaled_dot_product_attention))
    assert names(found, node)[2:] == ["token", "channel"]
    assert found.of(node)[1].is_("head")
    assert len(fake_mode(program.gm).shape_env.guards) == guards


def test_inserting_attention_changes_no_name():
    build = Grouped()
    given = {"q": torch.randn(3, 4, 6, 8), "k": torch.randn(3, 2, 5, 8), "v": torch.randn(3, 2, 5, 8)}
    program = captured(build, False, **given)
    before = [names(axes(program), n) for n in placeholders(program.gm)]
    attention.insert(program)
    assert [names(program.analysis(axes), n) for n in placeholders(program.gm)] == before
