"""One-D-Piece decodes the first codes of an image as the card's decoder does, on sequences that are as short, at any of the lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.models_zoo.small import PieceTokenizer
from accelpass.passes.core.base import Record
from accelpass.passes.visual_tokens.one_d_piece import OneDPiece, image_codes
from tests.ir.test_shrink import captured
from tests.passes.vision_truth import compiled
from tests.small_models import relative_error
from tests.sweep import examples


def pixels(images: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def card_codes(z: Tensor, table: Tensor) -> Tensor:
    """The card's ``vq``, by the cosine."""
    return (F.normalize(z, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


@torch.no_grad()
def card_image(model: PieceTokenizer, images: Tensor, k: int) -> Tensor:
    """The image of the first ``k`` codes, written from the card: an encoder that is run once, codes, and ``dec(q[:, :k])``."""
    x = model.patch_embed(images).flatten(2).mT + model.encoder_places
    x = torch.cat([x, model.latent_tokens.expand(len(x), -1, -1)], 1)
    for block in model.encoder:
        x = block(x.transpose(0, 1)).transpose(0, 1)
    codes = card_codes(model.narrow(x[:, 16:]), model.codebook.weight)
    q = F.normalize(model.codebook.weight, dim=-1)[codes][:, :k]
    x = torch.cat(
        [
            model.mask_token.expand(len(x), 16, -1) + model.decoder_places,
            model.wide(q) + model.latent_places[:k],
        ],
        1,
    )
    for block in model.decoder:
        x = block(x.transpose(0, 1)).transpose(0, 1)
    made: Tensor = model.pixels(model.norm(x[:, :16])).view(-1, 4, 4, 3, 6, 6)
    return made.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 24, 24)


@settings(max_examples=examples(4), deadline=None)
@given(latents=st.integers(2, 14), share=st.floats(0, 1), images=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_image_is_the_cards(latents: int, share: float, images: int, seed: int):
    model, k = small.piece_tokenizer(seed, latents=latents, layers=1), 1 + int(share * (latents - 2))
    given = pixels(images, seed)
    fast = compiled(model, [{"name": "one_d_piece", "length": k}])
    with torch.no_grad():
        assert relative_error(fast(given), card_image(model, given, k)) < 1e-5
    (done,) = accelpass.explain(fast).passes["one_d_piece"].took.values()
    assert done.what == f"{k} of {latents} codes are read, {math.ceil(k * math.log2(24))} bits of an image"


def rewritten(model: Callable[..., Any], *given: Tensor, **options: Any) -> tuple[Program, list[Any], Record]:
    program, inputs = captured(model, *given)
    record = Record("one_d_piece")
    OneDPiece(**options).apply(program, record)
    return program, inputs, record


def test_distances_positions_and_blocks_are_of_the_codes_that_are_read():
    program, _, record = rewritten(small.piece_tokenizer(), pixels(), length=5)
    assert not record.skipped
    assert [value(n).shape[2] for n in program.graph.nodes if is_attention(n)] == [28, 28, 21, 21]
    (argmin,) = (n for n in program.graph.nodes if "argmin" in n.name)
    assert value(argmin).shape == (2 * 5,) and value(argmin.args[0]).shape == (2 * 5, 24)


def test_all_codes_are_the_dense_model():
    model, given = small.piece_tokenizer(), pixels()
    fast = compiled(model, [{"name": "one_d_piece", "length": 12}])
    with torch.no_grad():
        assert torch.equal(fast(given), model(given))
    assert "all 12 codes" in " ".join(accelpass.explain(fast).passes["one_d_piece"].skipped.values())


def test_a_call_chooses_its_length_and_the_encoder_is_one():
    model, given = small.piece_tokenizer(), pixels()
    fast = compiled(model, [{"name": "one_d_piece", "length": 5, "lengths": [2, 8]}])
    with torch.no_grad():
        read = {None: 5, 1: 2, 2: 2, 3: 5, 8: 8, 9: 12, 400: 12}
        for wanted, k in read.items():
            if wanted is None:
                made = fast(given)
            else:
                with image_codes(wanted):
                    made = fast(given)
            assert relative_error(made, card_image(model, given, k)) < 1e-5
    (done,) = accelpass.explain(fast).passes["one_d_piece"].took.values()
    assert done.what.startswith("2 or 5 or 8 of 12 codes are read, 10 or 23 or 37 bits")
    (graph,) = graphs_of(model)
    assert graph.report.parts_compiled == 5  # an encoder, a decoder for each length, and one for all codes


class Written(PieceTokenizer):
    """Gradients pass the codebook by, codes are returned, codes stand before the learnt tokens, which have one more among them."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, images: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        codes = self.encode(images)
        read = codes if k is None else codes[:, :k]
        z = self.wide(F.normalize(self.codebook(read), dim=-1))
        z = z + (self.wide(F.one_hot(read % 6, 6).float()) - z).detach() + self.latent_places[: read.shape[1]]
        mask = torch.cat([self.front.expand(len(z), -1, -1), self.mask_token.repeat(len(z), 16, 1)], 1)
        x = torch.cat([z, mask], 1).transpose(0, 1)
        for block in self.decoder:
            x = block(x)
        return self.norm(x.transpose(0, 1)[:, -16:]), codes


def test_other_ways_to_write_one_and_codes_that_are_returned_whole():
    torch.manual_seed(0)
    model, given = Written().eval(), pixels()
    fast = compiled(model, [{"name": "one_d_piece", "length": 5}])
    with torch.no_grad():
        (image, codes), (want, every) = fast(given), model(given, 5)
    assert relative_error(image, want) < 1e-5 and torch.equal(codes, every) and codes.shape == (2, 12)


@pytest.mark.slow
def test_the_callers_codes_are_cut_too():
    model = small.piece_tokenizer()
    codes = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(0))
    fast = compiled(model.decode, [{"name": "one_d_piece", "length": 4}])
    with torch.no_grad():
        assert relative_error(fast(codes), model.decode(codes[:, :4])) < 1e-5
        for images in (1, 2, 5):  # another number of images is read as well
            some = codes[:1].expand(images, -1).contiguous()
            assert relative_error(fast(some), model.decode(some[:, :4])) < 1e-5


class Whole(PieceTokenizer):
    """Returns a row for each code."""

    def forward(self, images: Tensor) -> Tensor:
        z = self.wide(self.codebook(self.encode(images)))
        return self.decoder[0](torch.cat([self.mask_token.repeat(len(z), 16, 1), z], 1))


@pytest.mark.parametrize(
    ("model", "given", "why"),
    [
        (Whole().eval(), pixels(), "which the graph returns, has a row for each code"),
        (small.tower(), pixels(), "no codes of an image are joined"),
        (small.tiny_lm(), torch.arange(8)[None], "no codes of an image are joined"),
    ],
)
def test_what_is_not_taken_is_said(model: nn.Module, given: Tensor, why: str):
    fast = compiled(model, [{"name": "one_d_piece", "length": 3}])
    with torch.no_grad():
        got, want = fast(given), model(given)
    got, want = (x if isinstance(x, Tensor) else x.logits for x in (got, want))
    assert relative_error(got, want) < 1e-5
    assert why in " ".join(accelpass.explain(fast).passes["one_d_piece"].skipped.values())


@pytest.mark.parametrize("options", [{"length": 0}, {"lengths": (4, 2)}, {"lengths": (0, 2)}])
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        OneDPiece(**options)


def test_a_call_of_no_codes_is_refused():
    with pytest.raises(OptionError, match="use a number from 1"), image_codes(0):
        raise AssertionError


@pytest.mark.slow
def test_onnx(tmp_path: Path):
    model = small.piece_tokenizer()
    chosen = [{"name": "one_d_piece", "length": 5}, {"name": "int8_weights"}]
    report = accelpass.export_onnx(model, (pixels(),), tmp_path / "m.onnx", chosen)
    assert report.took()["one_d_piece"] == 1 and report.took()["int8_weights"] > 0
    assert report.difference is not None and report.difference < 1e-4
