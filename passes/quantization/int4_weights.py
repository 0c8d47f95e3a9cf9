"""int4 weights: groups along the input channels, two weights a byte, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from accelpass.ir.core.derived import Recipe
from accelpass.ir.linear.formats import GROUP_SIZES, Grouped, Int4, Int4Half
from accelpass.ir.linear.search import searched_grid
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.weight_only import NearestWeights, SharedWeight


@dataclass(frozen=True)
class Int4Weights(NearestWeights):
    """Store the weights of linears, tied embeddings and experts as int4 with a float32 scale for each group.

    Attributes:
        group_size: input channels that share a scale: 32, 64 or 128.
        symmetric: no zero point; False adds an integer zero point for each group (kept as float32).
        search: cut the range of a group where finer steps lose less than the cut does, as the authors of GPTQ do; packing takes longer,
            and nothing else.
        scales: ``float32``, or ``float16`` for scales and zero points of half the size; ONNX files then unpack the weight by operators.
    """

    group_size: int = 64
    symmetric: bool = True
    search: bool = False
    scales: str = "float32"

    name: ClassVar[str] = "int4_weights"
    summary: ClassVar[str] = "weights as int4 in groups, two per byte"
    paper: ClassVar[str] = "round to nearest with group scales, as the baseline of GPTQ, arXiv 2210.17323, section 5"
    reads: ClassVar[frozenset[str]] = frozenset({"linear.weight"})

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise self.fail("group_size", "32, 64 or 128")
        if self.scales not in ("float32", "float16"):
            raise self.fail("scales", "'float32' or 'float16'")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec((Int4Half if self.scales == "float16" else Int4)(self.group_size, self.symmetric))

    def grid(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of groups, searched for if that is asked for."""
        form = self.spec.weight
        assert isinstance(form, Grouped)
        return searched_grid(form, grouped) if self.search else form.grid(grouped)

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        plain, form = super().recipe(site, edit), self.spec.weight
        assert isinstance(form, Grouped)
        if not self.search:
            return plain

        def packed(w: Tensor) -> tuple[Tensor, ...]:
            w = w.flatten(1) if site.is_kernel else w
            grouped = form.grouped(w.transpose(-1, -2) if site.transposed else w)
            scale, zero = self.grid(grouped)
            return form.written(form.codes(grouped, scale, zero), scale, zero)

        return Recipe((*plain.key, "search"), packed)
