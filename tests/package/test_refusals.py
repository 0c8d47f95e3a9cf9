"""What cannot be packaged is refused by name, with the remedy, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelpass
from accelpass import ExportError, OptionError
from accelpass.backends.package import compiling, writing
from accelpass.ir.errors import CompilerMissingError
from accelpass.ir.inductor_private import NoCompiler
from tests.package.conftest import words
from tests.package.decoding import prompts
from tests.public.conftest import tiny_llama
from tests.small_models import Mlp


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    yield
    assert [p.name for p in tmp_path.iterdir()] == []


def _refused(
    tmp_path: Path,
    said: str,
    model: nn.Module | None = None,
    example: Any = None,
    kind: Any = ExportError,
    **settings: Any,
) -> None:
    model = Mlp().eval() if model is None else model
    example = torch.randn(3, 64) if example is None else example
    passes = settings.pop("passes", [])
    with pytest.raises(kind, match=said):
        accelpass.package(model, example, passes, path=settings.pop("path", tmp_path / "m.pt2"), **settings)


def test_paths(tmp_path: Path) -> None:
    _refused(tmp_path, r"m.onnx does not end in .pt2; type: m.onnx.pt2", path=tmp_path / "m.onnx")
    _refused(tmp_path, "there is no folder", path=tmp_path / "none" / "m.pt2")


def test_passes_that_choose_on_the_host(tmp_path: Path) -> None:
    _refused(tmp_path, r"the model takes no timestep \(x\)", passes=["delta_cache"])
    _refused(
        tmp_path,
        "lazyllm reads back at each step after the prompt how much there is to compute",
        tiny_llama(2),
        prompts(1, 6),
        passes=["lazyllm"],
        cache=16,
    )
    _refused(tmp_path, "unknown pass 'int9_weights'", kind=OptionError, passes=["int9_weights"])


def test_a_cache_pass_without_a_cache(tmp_path: Path) -> None:
    _refused(tmp_path, "h2o changes how a key/value cache is kept", tiny_llama(1), prompts(1, 6), passes=["h2o"])


def test_models_and_examples(tmp_path: Path) -> None:
    _refused(tmp_path, "is in training mode", Mlp())
    llama = tiny_llama(1)
    _refused(tmp_path, "the example's prompt has one token; give two or more", llama, prompts(1, 1), cache=16)
    _refused(tmp_path, "the example gives attention_mask, too", llama, (prompts(1, 4), torch.ones(1, 4)), cache=16)
    _refused(tmp_path, "example holds no tensor", llama, {}, cache=16)

    class Counter(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x * self.seen

    _refused(tmp_path, "the model writes to seen, which a file cannot", Counter().eval())


def test_tokenizers(tmp_path: Path) -> None:
    ids = {"input_ids": prompts(1, 5), "logits_to_keep": 1}
    said = "a list cannot be packaged; give a fast tokenizer of transformers, a tokenizers.Tokenizer, or the path"
    _refused(tmp_path, said, tiny_llama(1), ids, cache=24, tokenizer=["a", "b"])
    _refused(
        tmp_path,
        r"nowhere.json cannot be read as a tokenizer.json",
        tiny_llama(1),
        ids,
        cache=24,
        tokenizer="nowhere.json",
    )
    with tempfile.TemporaryDirectory() as folder:
        (other := Path(folder) / "config.json").write_text('{"layers": 3}')
        _refused(
            tmp_path, "is no tokenizer.json: it says nothing of a model", tiny_llama(1), ids, cache=24, tokenizer=other
        )
    _refused(tmp_path, "a tokenizer is packaged with a decoder, and there is no cache", tokenizer=words())


def test_an_operator_that_runs_in_python(tmp_path: Path) -> None:
    @torch.library.custom_op("packagetest::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    _refused(
        tmp_path, "leaves the operator packagetest.twice.default in the graph, which runs in Python", Twice().eval()
    )


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise NoCompiler("No working C++ compiler found.")

    monkeypatch.setattr(compiling, "compile_ahead", fail)
    said = (
        "packaging needs a C\\+\\+ compiler: No working .* Install one .* The machine that opens the package needs none"
    )
    _refused(tmp_path, said, kind=CompilerMissingError)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None: ...

        def write_bytes(self, name: str, content: bytes) -> None:
            raise RuntimeError("file write failed: No space left on device")

    def compiled(one: compiling.Rewritten, *args: Any) -> compiling.Compiled:
        return compiling.Compiled(one, writing.about.Graph([], ["output"], {}), {}, {}, 0.0)

    monkeypatch.setattr(writing, "compiled", compiled)
    monkeypatch.setattr(writing, "archive_writer", lambda path: Full())
    _refused(tmp_path, "No space left on device; free some space or choose another folder", verify=False)


def test_a_library_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelpass.backends.package.checking import difference

    with pytest.raises(ExportError, match=r"logits differs by 5.0e-01 of its largest value"):
        difference(["logits"], [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    with pytest.raises(ExportError, match=r"ids differs by"):
        difference(["ids"], [torch.tensor([1, 2])], [torch.tensor([1, 3])])
    with pytest.raises(ExportError, match="when compiled"):
        difference(["x"], [torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ExportError, match="differs by nan"):
        difference(["x"], [torch.tensor([torch.nan])], [torch.tensor([1.0])])
