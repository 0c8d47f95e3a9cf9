"""Norms, MLPs, mixtures of experts, caches, residual blocks and heads, against which modules an eager forward calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelpass.ir import attention
from accelpass.ir.analyses.structure.block import blocks, sublayers
from accelpass.ir.analyses.structure.kv_cache import kv_caches
from accelpass.ir.analyses.structure.mlp import mlps
from accelpass.ir.analyses.structure.moe import moes
from accelpass.ir.analyses.structure.norm import norms
from accelpass.ir.analyses.structure.output_head import output_heads
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import is_call
from accelpass.models_zoo import tiny
from tests.sweep import sweep

ANALYSES = (norms, mlps, moes, kv_caches, blocks, output_heads)

# Which classes are what: one call of such a module is one record. Kinds that are not named must not be found.
TRUTH = {
    "causal_lm/llama": {"norm": "LlamaRMSNorm", "gated_mlp": "LlamaMLP", "block": "LlamaDecoderLayer"},
    "causal_lm/gpt2": {"norm": "LayerNorm", "mlp": "GPT2MLP", "block": "GPT2Block"},
    "causal_lm/mixtral": {"norm": "MixtralRMSNorm", "moe": "MixtralExperts", "block": "MixtralDecoderLayer"},
    "masked_lm/bert": {"norm": "LayerNorm", "mlp": "BertIntermediate", "block": "BertLayer"},
    "diffusion/dit": {"norm": "LayerNorm", "mlp": "FeedForward TimestepEmbedding", "block": "BasicTransformerBlock"},
}
MORE = {
    "causal_lm/gemma2": {"norm": "Gemma2RMSNorm", "gated_mlp": "Gemma2MLP", "block": "Gemma2DecoderLayer"},
    "causal_lm/deepseek_v3": {
        "norm": "DeepseekV3RMSNorm",
        "gated_mlp": "DeepseekV3MLP",
        "moe": "DeepseekV3MoE",
        "block": "DeepseekV3DecoderLayer",
    },
    "image/convnext": {"norm": "LayerNorm ConvNextLayerNorm", "mlp": "ConvNextLayer", "block": "ConvNextLayer"},
    "causal_lm/qwen2_moe": {
        "norm": "Qwen2MoeRMSNorm",
        "gated_mlp": "Qwen2MoeMLP",
        "moe": "Qwen2MoeExperts",
        "block": "Qwen2MoeDecoderLayer",
    },
    "causal_lm/gpt_oss": {"norm": "GptOssRMSNorm", "moe": "GptOssExperts", "block": "GptOssDecoderLayer"},
    "causal_lm/gemma3_text": {"norm": "Gemma3RMSNorm", "gated_mlp": "Gemma3MLP", "block": "Gemma3DecoderLayer"},
    "image/vit": {"norm": "LayerNorm", "mlp": "ViTMLP", "block": "ViTLayer"},
    "image/dinov2": {"norm": "LayerNorm", "mlp": "Dinov2MLP", "block": "Dinov2Layer"},
    "diffusion/flux": {
        "norm": "LayerNorm RMSNorm",
        "mlp": "FeedForward TimestepEmbedding PixArtAlphaTextProjection",
        "block": "FluxTransformerBlock FluxSingleTransformerBlock",
    },
    "diffusion/pixart": {
        "norm": "LayerNorm",
        "mlp": "FeedForward TimestepEmbedding PixArtAlphaTextProjection",
        "block": "BasicTransformerBlock",
    },
}
HEADS = {"causal_lm": "vocabulary", "masked_lm": "vocabulary", "image": "classifier"}


def programs(model, *calls):
    """The graphs of each call, with semantic attentions as passes see them."""
    torch._dynamo.reset()
    kept = []

    def backend(gm, inputs):
        program = from_dynamo(gm, inputs)
        attention.insert(program)
        kept.append(program)
        return gm.forward

    run = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for call in calls:
            run(**call) if isinstance(call, dict) else run(*call)
    return kept


def one(model, *args):
    (program,) = programs(model.eval(), args)
    return program


def called(model, kwargs):
    """Forward calls by class name in eager mode."""
    count = Counter()
    hooks = [m.register_forward_pre_hook(lambda m, _: count.update([type(m).__name__])) for m in model.modules()]
    with torch.no_grad():
        model(**kwargs)
    for hook in hooks:
        hook.remove()
    return count


def counted(program):
    found = Counter({f.__name__.removesuffix("s"): len(program.analysis(f)) for f in (norms, moes, blocks)})
    found.update(mlp.kind for mlp in program.analysis(mlps))
    return {kind: n for kind, n in found.items() if n}


def check(key, truth):
    build = tiny.family(key).build()
    calls = called(build.model, build.kwargs)
    (program,) = programs(build.model, build.kwargs)
    want = {kind: sum(calls[name] for name in names.split()) for kind, names in truth.items()}
    assert all(want.values()), f"{key}: a class was renamed: {want}, {dict(calls)}"
    assert counted(program) == want
    kinds = [head.kind for head in program.analysis(output_heads)]
    assert kinds == ([HEADS[key.split("/")[0]]] if key.split("/")[0] in HEADS else [])
    assert not program.analysis(kv_caches)
    return program


@pytest.mark.parametrize("key", sweep(*TRUTH, *MORE, fast=len(TRUTH)))
def test_counts_are_the_modules_called(key):
    program = check(key, {**TRUTH, **MORE}[key])
    facts = FACTS.get(key)
    if facts is not None:
        facts(program)


def of_llama(program):
    assert {s.norm for s in program.analysis(sublayers)} == {"pre"}
    assert [b.path for b in program.analysis(blocks)] == ["model.layers.0", "model.layers.1"]
    first, second = program.analysis(blocks)
    assert second.input is first.output
    assert {m.path for m in program.analysis(mlps)} == {"model.layers.0.mlp", "model.layers.1.mlp"}


def of_gpt2(program):
    assert {m.activation for m in program.analysis(mlps)} == {"gelu_tanh"}
    assert all(head.tied for head in program.analysis(output_heads))


def of_gemma2(program):
    assert {n.weight_offset for n in program.analysis(norms)} == {1.0}
    assert {s.norm for s in program.analysis(sublayers)} == {"sandwich"}
    (head,) = program.analysis(output_heads)
    assert (head.tied, head.softcap) == (True, pytest.approx(30.0))


def of_mixtral(program):
    for moe in program.analysis(moes):
        assert (moe.form, moe.experts, moe.top_k, len(moe.weights), moe.shared) == ("stacked", 4, 2, 2, None)
        assert moe.x in {norm.node for norm in program.analysis(norms)}


def of_deepseek(program):
    (moe,) = program.analysis(moes)
    assert moe.shared is not None
    assert moe.top_k == 2
    assert [[s.kind for s in b.sublayers] for b in program.analysis(blocks)] == [
        ["attention", "mlp"],
        ["attention", "moe"],
    ]


def of_bert(program):
    assert {s.norm for s in program.analysis(sublayers)} == {"post"}
    outputs = {b.output for b in program.analysis(blocks)}
    assert outputs < {norm.node for norm in program.analysis(norms)}


def of_convnext(program):
    assert [s.kind for s in program.analysis(sublayers)] == ["mixer"] * 4


def of_dit(program):
    assert all(n.modulated for n in program.analysis(norms))
    assert all(s.gate is not None for s in program.analysis(sublayers))


FACTS = {
    "causal_lm/llama": of_llama,
    "causal_lm/gpt2": of_gpt2,
    "causal_lm/gemma2": of_gemma2,
    "causal_lm/mixtral": of_mixtral,
    "causal_lm/deepseek_v3": of_deepseek,
    "masked_lm/bert": of_bert,
    "image/convnext": of_convnext,
    "diffusion/dit": of_dit,
}


@pytest.mark.slow
def test_encoder_and_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.arange(6)[None]
    kwargs = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False}
    calls = called(model, kwargs)
    (program,) = programs(model, kwargs)
    want = {"norm": calls["T5LayerNorm"], "mlp": calls["T5DenseActDense"], "block": calls["T5Block"]}
    assert counted(program) == want
    assert {tuple(s.kind for s in b.sublayers) for b in program.analysis(blocks)} == {
        ("attention", "mlp"),
        ("attention", "attention", "mlp"),
    }
    assert [head.kind for head in program.analysis(output_heads)] == ["vocabulary"]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=64)).eval()


def generated(model, cache, prompt=5):
    """(prefill, decode)"""
    ids = torch.arange(prompt)[None]
    shared = {"past_key_values": cache, "use_cache": True}
    return programs(model, {"input_ids": ids, **shared}, {"input_ids": ids[:, :1], **shared})


def behind(node, stop):
    """Names of the parameters of the linears that ``node`` is computed from."""
    seen, front, found = {node}, [node], set()
    while front:
        here = front.pop()
        if is_call(here, torch.ops.aten.linear):
            found.add(stop(here.args[1]))
            continue
        fresh = [n for n in here.all_input_nodes if n not in seen]
        seen.update(fresh)
        front += fresh
    return found


def static_cache(model, length):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.early_initialization(1, 2, 8, torch.float32, "cpu")
    return cache


def check_new(program):
    for number, cache in enumerate(program.analysis(kv_caches)):
        assert cache.path == f"model.layers.{number}.self_attn"
        for new, name in zip(cache.new, "kv", strict=True):
            path = f"model.layers.{number}.self_attn.{name}_proj.weight"
            assert {p for p in behind(new, program.tensors.path) if path in p} == {path}


def test_static_cache(llama):
    for program in generated(llama, static_cache(llama, 12)):
        found = program.analysis(kv_caches)
        assert [c.kind for c in found] == ["static", "static"]
        check_new(program)
        for cache in found:
            assert all(b.op == "placeholder" for b in cache.buffers)
            assert all(is_call(w, torch.ops.aten.index_copy_) for w in cache.writes)
            assert cache.positions is not None
            assert len(cache.attentions) == 1


def test_dynamic_cache(llama):
    from transformers import DynamicCache

    prefill, decode = generated(llama, DynamicCache(config=llama.config))
    for program in (prefill, decode):
        assert [c.kind for c in program.analysis(kv_caches)] == ["dynamic", "dynamic"]
        check_new(program)
    assert all(c.buffers is None for c in prefill.analysis(kv_caches))
    assert all(b.op == "placeholder" for c in decode.analysis(kv_caches) for b in c.buffers)


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_sliding_caches(static):
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, vocab_size=64, sliding_window=4)).eval()
    cache = static_cache(model, 12) if static else DynamicCache(config=model.config)
    for program in generated(model, cache):
        assert [c.kind for c in program.analysis(kv_caches)] == ["static" if static else "dynamic"] * 2
        check_new(program)


class Normed(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.core(self, x) * 2 + x.sum()


def by_pow(m, x):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * m.weight


def by_root(m, x):
    return m.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5))


def plus_one(m, x):
    return (x * torch.pow(x.pow(2).mean(-1, True) + 1e-6, -0.5) * (1.0 + m.weight.float())).type_as(x)


def by_hand(m, x):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * m.weight + m.bias


def native(m, x):
    return F.layer_norm(x, (8,), m.weight, m.bias)


def native_rms(m, x):
    return F.rms_norm(x, (8,), m.weight, 1e-6)


def grouped(m, x):
    return F.group_norm(x, 2, m.weight, m.bias)


NORMS = {
    by_pow: ("rms_norm", 1e-6, 0.0),
    by_root: ("rms_norm", 1e-5, 0.0),
    plus_one: ("rms_norm", 1e-6, 1.0),
    by_hand: ("layer_norm", 1e-5, 0.0),
    native: ("layer_norm", 1e-5, 0.0),
    native_rms: ("rms_norm", 1e-6, 0.0),
    grouped: ("group_norm", 1e-5, 0.0),
}


def test_spellings_of_norms():
    for core in NORMS:
        check_norm(core)


def check_norm(core):
    program = one(Normed(core), torch.randn(3, 8, 8))
    (norm,) = program.analysis(norms)
    assert (norm.kind, norm.eps, norm.weight_offset) == NORMS[core]
    assert norm.x.op == "placeholder"
    assert program.tensors.path(norm.weight) == "weight"
    assert (norm.bias is None) == (norm.kind == "rms_norm")
    (product,) = [n for n in program.graph.nodes if is_call(n, torch.ops.aten.mul) and n.args[1] == 2]
    assert product.args[0] is norm.node


def test_l2_normalisation_is_no_norm():
    class L2(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), F.normalize(x, dim=-1)

    assert not one(L2(), torch.randn(3, 8)).analysis(norms)


class Feed(nn.Module):
    def __init__(self, core, up=16):
        super().__init__()
        self.core, self.norm = core, nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, up), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.core(self, self.norm(x)))


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def fast_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def python_gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


def halves(m, x):
    gate, up = m.up(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def normed(m, x):
    h = F.relu(m.gate(x)) * m.up(x)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def sliced(m, x):
    both = m.up(x)
    return both[..., 16:] * F.gelu(both[..., :16])


MLPS = {
    "gelu": (lambda m, x: F.gelu(m.up(x)), "mlp", 16),
    "gelu_tanh": (lambda m, x: new_gelu(m.up(x)), "mlp", 16),
    "gelu_tanh fast": (lambda m, x: fast_gelu(m.up(x)), "mlp", 16),
    "gelu python": (lambda m, x: python_gelu(m.up(x)), "mlp", 16),
    "quick_gelu": (lambda m, x: (lambda h: h * torch.sigmoid(1.702 * h))(m.up(x)), "mlp", 16),
    "relu2": (lambda m, x: F.relu(m.up(x)).square(), "mlp", 16),
    "silu": (lambda m, x: F.silu(m.gate(x)) * m.up(x), "gated_mlp", 16),
    "relu, then a norm": (normed, "gated_mlp", 16),
    "silu halves": (halves, "gated_mlp", 32),
    "gelu sliced": (sliced, "gated_mlp", 32),
    "sigmoid glu": (lambda m, x: F.glu(m.up(x)), "gated_mlp", 32),
}


def test_spellings_of_mlps():
    for name in MLPS:
        check_mlp(name)


def check_mlp(name):
    core, kind, width = MLPS[name]
    program = one(Feed(core, width), torch.randn(3, 8))
    (mlp,) = program.analysis(mlps)
    assert (mlp.kind, mlp.activation) == (kind, name.split()[0].strip(","))
    assert mlp.fused == (width == 32)
    assert mlp.up.path == "up"
    assert mlp.down.path == "down"
    if kind == "gated_mlp" and not mlp.fused:
        assert mlp.gate.path == "gate"
    assert mlp.x is program.analysis(norms)[0].node
    (block,) = program.analysis(blocks)
    assert (block.sublayers[0].kind, block.sublayers[0].norm) == ("mlp", "pre")


NOT_MLPS = {
    "no activation": lambda m, x: m.up(x),
    "a low-rank gate": lambda m, x: torch.sigmoid(m.up(x)),
    "hidden is read elsewhere": lambda m, x: (lambda h: F.relu(h) + 0 * h.sum())(m.up(x)),
    "two inputs": lambda m, x: F.silu(m.gate(x)) * m.up(x + 1),
    "a norm alone": lambda m, x: F.rms_norm(m.up(x), (16,)),
    "bilinear": lambda m, x: m.gate(x) * m.up(x),
}


def test_what_is_no_mlp():
    for name, core in NOT_MLPS.items():
        assert not one(Feed(core), torch.randn(3, 8)).analysis(mlps), name


class Experts(nn.Module):
    """Two experts by a loop over all tokens, as one graph can hold it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 16, 8)), nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for expert in range(2):
            mine = (chosen == expert).to(x.dtype) * weight
            out = out + F.linear(F.relu(F.linear(x * mine, self.up[expert])), self.down[expert])
        return x + out


def test_experts_in_a_loop():
    (moe,) = one(Experts(), torch.randn(5, 8)).analysis(moes)
    assert (moe.form, moe.experts, moe.top_k) == ("loop", 2, 1)
    assert moe.x.op == "placeholder"
    assert len(moe.nodes) == 4


def test_nothing_is_found_where_nothing_is():
    class Plain(nn.Module):
        def forward(self, x, index):
            top = x.topk(2).values
            return (x @ x.mT).softmax(-1), torch.cat([x, x]), top, x[index], x.add_(1)

    program = one(Plain(), torch.randn(4, 4), torch.tensor([1]))
    assert [program.analysis(f) for f in ANALYSES] == [[] for _ in ANALYSES]
