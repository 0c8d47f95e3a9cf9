"""Checkpoints of GPTQ, AWQ, compressed-tensors and GGUF: written here as their own tools do, read, and run without a second rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import Result

import accelpass
from accelpass.api.prequantized import quantized_plan
from accelpass.checkpoints.codes import Checkpoint
from accelpass.checkpoints.compressed import read_compressed
from accelpass.checkpoints.gguf_file import TYPES
from accelpass.checkpoints.gptq_awq import read_awq, read_gptq
from tests.public.conftest import tiny_llama
from tests.sweep import examples

SIZES = st.tuples(st.sampled_from([32, 64]), st.sampled_from([64, 128]), st.integers(0, 2**16))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half(size: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return (torch.rand(size, generator=rng) / 50 + 1e-3).half()


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes of each column ``(n, columns)`` as int32 words, as AutoGPTQ packs them: bits of a number may lie in two words."""
    rows = codes.shape[0] * bits // 32
    packed = np.zeros((rows, codes.shape[1]), np.uint64)
    for i, row in enumerate(codes.numpy().astype(np.uint64)):
        word, shift = divmod(i * bits, 32)
        packed[word] |= (row << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            packed[word + 1] |= row >> np.uint64(32 - shift)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def the_weight(found: Checkpoint) -> Tensor:
    (stored,) = found.weights.values()
    return stored.values()


def gptq_file(rng: torch.Generator, outputs: int, inputs: int, bits: int, group: int, ordered: bool, v2: bool) -> Any:
    codes = torch.randint(2**bits, (inputs, outputs), generator=rng)
    zero = torch.randint(1, 2**bits, (inputs // group, outputs), generator=rng)
    scales = half((inputs // group, outputs), rng)
    index = torch.arange(inputs) // group
    index = index[torch.randperm(inputs, generator=rng)] if ordered else index
    tensors = {
        "up.qweight": words(codes, bits), "up.qzeros": words((zero - (0 if v2 else 1)).t(), bits).t().contiguous(),
        "up.scales": scales, "up.g_idx": index.int(), "up.bias": torch.randn(outputs, generator=rng),
    }  # fmt: skip
    return tensors, ((codes - zero[index]) * scales[index].float()).t()


@settings(max_examples=examples(10), deadline=None)
@given(SIZES, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64]), st.booleans(), st.booleans())
def test_gptq(sizes, bits, group, ordered, v2) -> None:
    outputs, inputs, seed = sizes
    tensors, want = gptq_file(drawn(seed), outputs, inputs, bits, group, ordered, v2)
    found = read_gptq(tensors, {"bits": bits, "checkpoint_format": "gptq_v2" if v2 else "gptq"})
    assert torch.equal(the_weight(found), want) and set(found.floats) == {"up.bias"}


@settings(max_examples=examples(6), deadline=None)
@given(SIZES, st.sampled_from([32, 64]))
def test_awq(sizes, group) -> None:
    outputs, inputs, seed = sizes
    rng = drawn(seed)
    codes = torch.randint(16, (inputs, outputs), generator=rng)
    zero = torch.randint(16, (inputs // group, outputs), generator=rng)
    scales = half((inputs // group, outputs), rng)

    def interleaved(numbers: Tensor) -> Tensor:
        """AutoAWQ's loop: nibble i of a word is column order[i] of its eight."""
        packed = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
        for column in range(packed.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= numbers[:, column * 8 + place] << (4 * i)
        return torch.from_numpy(packed.numpy().astype(np.uint32).view(np.int32).copy())

    tensors = {"up.qweight": interleaved(codes), "up.qzeros": interleaved(zero), "up.scales": scales}
    want = ((codes - zero.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)).t()
    assert torch.equal(the_weight(read_awq(tensors, {"bits": 4})), want)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    inputs = weights.pop("inputs", None)
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


@settings(max_examples=examples(8), deadline=None)
@given(SIZES, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, None]), st.booleans())
def test_compressed_tensors_in_words(sizes, bits, group, symmetric) -> None:
    outputs, inputs, seed = sizes
    rng, groups = drawn(seed), 1 if group is None else inputs // group
    codes = torch.randint(2**bits, (outputs, inputs), generator=rng)
    zero = torch.randint(2**bits, (outputs, groups), generator=rng)
    scale = half((outputs, groups), rng)
    tensors = {
        "up.weight_packed": words(codes.t(), bits).t().contiguous(), "up.weight_scale": scale,
        "up.weight_shape": torch.tensor([outputs, inputs]),
    }  # fmt: skip
    if not symmetric:
        tensors["up.weight_zero_point"] = words(zero, bits)
    found = read_compressed(tensors, compressed("pack-quantized", num_bits=bits, symmetric=symmetric))
    middle = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    want = (codes - middle.repeat_interleave(inputs // groups, 1)) * scale.float().repeat_interleave(
        inputs // groups, 1
    )
    assert torch.equal(the_weight(found), want)


def test_compressed_tensors_of_eight_bits() -> None:
    rng = drawn(0)
    codes, scale = torch.randint(-127, 128, (16, 64), generator=rng, dtype=torch.int8), half((16, 1), rng)
    tensors = {"up.weight": codes, "up.weight_scale": scale}
    found = read_compressed(tensors, compressed("int-quantized", num_bits=8, inputs={"type": "int", "dynamic": True}))
    assert torch.equal(the_weight(found), codes.float() * scale.float())
    assert found.weights["up.weight"].spec.shown() == "int8 x int8_per_token"
    tensors |= {"up.input_scale": torch.tensor([0.03])}
    found = read_compressed(tensors, compressed("int-quantized", num_bits=8, inputs={"dynamic": False}))
    stored = found.weights["up.weight"]
    assert stored.spec.shown() == "int8 x int8_static" and torch.equal(stored.known[0], torch.full((16,), 0.03))
    floats = torch.randn(16, 64, generator=rng).to(torch.float8_e4m3fn)
    for one in (scale, scale[:1, 0]):
        tensors = {"up.weight": floats, "up.weight_scale": one}
        found = read_compressed(tensors, compressed("float-quantized", num_bits=8, type="float"))
        assert torch.equal(the_weight(found), floats.float() * one.float().reshape(-1, 1))


@settings(max_examples=examples(10), deadline=None)
@given(st.sampled_from(list(TYPES)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_gguf_blocks(kind, rows, blocks, seed) -> None:
    gguf = pytest.importorskip("gguf")
    reader, size = TYPES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scales = np.random.default_rng(seed).normal(0, 0.02, (rows, blocks, 2)).astype(np.float16)
    at = {"Q6_K": 208}.get(kind, 0)
    raw[..., at : at + 2] = scales[..., :1].view(np.uint8)
    if kind in ("Q4_1", "Q4_K"):
        raw[..., 2:4] = scales[..., 1:].view(np.uint8)
    want = gguf.quants.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    got = reader(torch.from_numpy(raw)).values()
    if kind in ("Q4_0", "Q8_0", "Q6_K"):
        assert torch.equal(got, torch.from_numpy(want))
    else:  # the minimum is a zero point of float32 times the scale
        assert (got - torch.from_numpy(want)).abs().max() <= 2e-6 * np.abs(want).max()


def test_groups_of_one_number_keep_it() -> None:
    gguf = pytest.importorskip("gguf")
    flat = np.full((1, 32), 0.75, np.float32)
    raw = gguf.quants.quantize(flat, gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(TYPES["Q4_1"][0](torch.from_numpy(raw)[None]).values(), torch.from_numpy(flat))


# --- whole models ---


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def gptq(tmp_path: Path) -> tuple[Path, Tensor]:
    """Columns in the order of their importance; one linear is in floats."""
    tensors, want = gptq_file(drawn(0), 32, 64, 4, 32, True, False)
    down = nn.Linear(32, 8)
    save_file(tensors | {"down.weight": down.weight.data, "down.bias": down.bias.data}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    return tmp_path, want


def test_a_model_computes_with_the_codes(gptq) -> None:
    folder, want = gptq
    torch._dynamo.reset()
    model, x = Two(), torch.randn(3, 64, generator=drawn(1))
    fast = accelpass.load_quantized(model, folder, lowering="eager")
    assert torch.equal(model.up.weight, want)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        made = accelpass.explain(fast).passes["prequantized"]
        assert list(made.took) == ["up"] and made.skipped == {"down": "the checkpoint has no codes for it"}
        model.up.weight.add_(1)
        with pytest.raises(accelpass.PlanError, match="up is not the weight that the checkpoint has"):
            fast(x)


def test_a_saved_folder_keeps_the_codes(gptq, tmp_path: Path) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 64, generator=drawn(1))
    fast = accelpass.load_quantized(Two(), gptq[0], lowering="eager")
    with torch.no_grad():
        want = fast(x)
        accelpass.save(fast, tmp_path / "ours")
        torch._dynamo.reset()
        assert torch.equal(accelpass.load(Two(), tmp_path / "ours")(x), want)


def write_gguf(path: Path, model: nn.Module) -> None:
    """As llama.cpp's converter does: queries and keys are woven, and each matrix is in Q8_0 or Q4_0."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    config: Any = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        module, _, part = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if heads is not None:
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        kind = {1: "F32"}.get(value.dim(), "Q8_0" if "self_attn" in module else "Q4_0")
        raw = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{names.get_name(module)}.{part}", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_a_llama(tmp_path: Path, cli: Callable[..., Result]) -> None:
    pytest.importorskip("gguf")
    torch._dynamo.reset()
    source, path = tiny_llama(1), tmp_path / "tiny.gguf"
    write_gguf(path, source)
    model, ids = tiny_llama(1), torch.arange(9)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fast = accelpass.load_quantized(model, path, lowering="eager")
    for name, value in source.state_dict().items():  # read in the right order, to the rounding of its codes
        step = 0.01 if value.dim() > 1 else 0
        assert (model.state_dict()[name] - value).abs().max() <= step, name
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    made = accelpass.explain(fast).passes["prequantized"]
    assert len(made.took) == 9 and "int8_groups" in made.took["model.layers.0.self_attn.q_proj"].what
    shown = cli("quantize", path, "-o", tmp_path / "ours")
    assert shown.exit_code == 0, shown.output
    assert "prequantized: 9 weights" in shown.stdout
    again = accelpass.load(tiny_llama(1), tmp_path / "ours", lowering="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, fast(ids).logits)
    refused = cli("quantize", path, "-o", tmp_path / "others", "--method", "gptq")
    assert refused.exit_code == 2 and "is quantized already" in refused.output


def test_eval_scores_a_checkpoint(folder: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    torch._dynamo.reset()
    tensors = tiny_llama(1).state_dict()
    tensors.pop("lm_head.weight")
    name = "model.layers.0.mlp.up_proj"
    codes, scale = torch.randint(-8, 8, (96, 64), generator=drawn(0)), half((96, 1), drawn(0))
    tensors.pop(f"{name}.weight")
    tensors |= {f"{name}.weight": codes.to(torch.int8), f"{name}.weight_scale": scale}
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = compressed("int-quantized", num_bits=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    prose = tmp_path / "prose.txt"
    prose.write_text("the dog sleeps on. " * 9)
    shown = cli("eval", tmp_path, "--data", prose, "--tokens", 60, "--lowering", "eager", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["ratio"] == pytest.approx(1, abs=1e-4) and found["agreement"] == 1


# --- what is refused ---


def config(**quantization: Any) -> str:
    return json.dumps({"quantization_config": quantization})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (config(quant_method="bitsandbytes"), "quantized by 'bitsandbytes'; checkpoints of gptq, awq"),
        ("{}", "no config.json with a quantization_config"),
        ("{", "config.json cannot be read"),
        (config(quant_method="gptq", bits=5), "bits=5; 2, 3, 4 and 8 are read"),
        (config(quant_method="awq", bits=4, version="gemv"), "version='gemv'; 4 and 'gemm' are read"),
    ],
)
def test_unknown_formats_are_named(gptq, text: str, said: str) -> None:
    (gptq[0] / "config.json").write_text(text)
    with pytest.raises(accelpass.CheckpointError, match=said):
        accelpass.load_quantized(Two(), gptq[0])


def test_files_that_are_not_there_or_damaged(gptq, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none", "no file or folder"), (tmp_path / "config.json", "is no .gguf file")):
        with pytest.raises(accelpass.CheckpointError, match=said):
            accelpass.load_quantized(Two(), path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(accelpass.CheckpointError, match="is no GGUF file, or is cut short"):
        accelpass.load_quantized(Two(), tmp_path / "cut.gguf")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(accelpass.CheckpointError, match="cannot be read"):
        accelpass.load_quantized(Two(), tmp_path)
    file.unlink()
    with pytest.raises(accelpass.CheckpointError, match=r"has no \.safetensors file"):
        accelpass.load_quantized(Two(), tmp_path)


def test_checkpoints_of_other_models(gptq) -> None:
    folder, model = gptq[0], Two()
    model.more = nn.Linear(4, 4)
    with pytest.raises(accelpass.CheckpointError, match=r"has no more\.weight, more\.bias, which this Two needs"):
        accelpass.load_quantized(model, folder)
    with pytest.raises(accelpass.CheckpointError, match=r"which this Linear does not have"):
        accelpass.load_quantized(nn.Linear(64, 32), folder)
    wide = Two()
    wide.up = nn.Linear(128, 32)
    with pytest.raises(
        accelpass.CheckpointError, match=r"up.weight as \[32, 64\], and the model has it as \[32, 128\]"
    ):
        accelpass.load_quantized(wide, folder)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"form": "marlin-24"}, "format 'marlin-24'"),
        ({"num_bits": 5}, "has 5 bits"),
        ({"inputs": {"dynamic": False}}, "a range of its own"),
        ({"inputs": {"dynamic": True, "type": "float"}}, "8 of int are read"),
        ({"form": "float-quantized"}, "of floats float8_e4m3fn is read"),
    ],
)
def test_what_of_compressed_tensors_is_refused(more: dict[str, Any], said: str) -> None:
    tensors = {"up.weight": torch.zeros(4, 32, dtype=torch.int8), "up.weight_scale": torch.ones(4, 1)}
    given = {"form": "int-quantized", "num_bits": 8} | more
    with pytest.raises(accelpass.CheckpointError, match=said):
        read_compressed(tensors, compressed(given.pop("form"), **given))


def test_gptq_files_that_are_cut_short_or_uneven() -> None:
    tensors, _ = gptq_file(drawn(0), 32, 64, 4, 32, False, False)
    with pytest.raises(accelpass.CheckpointError, match="no qzeros: the checkpoint is cut short"):
        read_gptq({k: v for k, v in tensors.items() if not k.endswith("qzeros")}, {"bits": 4})
    with pytest.raises(accelpass.CheckpointError, match="g_idx does not name each of 2 groups 32 times"):
        read_gptq(tensors | {"up.g_idx": torch.zeros(64, dtype=torch.int32)}, {"bits": 4})


@pytest.mark.slow
def test_the_weights_of_smollm2_from_their_own_codes() -> None:
    """Its file in Q4_1 and Q8_0 against what transformers makes of it."""
    zoo = pytest.importorskip("accelpass.models_zoo.smollm2")
    from accelpass.models_zoo.packaged import package_folder

    model, _ = zoo.load(torch.float32)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    quantized_plan(model, package_folder(zoo.PACKAGE) / zoo.FILE)
    for name, value in model.state_dict().items():
        assert (value - want[name]).abs().max() <= 2e-6 * want[name].abs().max(), name
