"""Keys and values of a KVCache in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.banks import Quantized
from accelpass.ir.kv.rotated import Rotated
from accelpass.ir.kv.rows import BITS
from accelpass.ir.kv.sites import KVSite
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass


@dataclass(frozen=True)
class KVQuant(KVPass):
    """Round each stored row to integers with a step and a lowest value for each token, head and group of channels.

    The rounding of MiKV's retained cache, for every token: asymmetric, by token, two groups of channels in a row, so that
    the halves of a rotary pair have one each. Together with a pass that evicts, the rows that it keeps are rounded.

    Attributes:
        bits: 8, 4, 3 or 2.
        groups: groups of channels in a row.
        rotate: turn rows by a Hadamard matrix before they are rounded, and queries likewise, as QuaRot does with keys (section 4.3;
            values, too, here): channels with outliers are spread over all. Heads of 64, 128, 256 channels.

    Raises:
        OptionError: other bits, or no group.
    """

    name: ClassVar[str] = "kv_quant"
    summary: ClassVar[str] = "keys and values of a KVCache in 8, 4, 3 or 2 bits, rounded by token and group of channels"
    paper: ClassVar[str] = (
        "the rounding of MiKV, arXiv 2402.18096; rotate: Ashkboos et al. 2024, QuaRot, arXiv 2404.00456"
    )
    edits: ClassVar[frozenset[str]] = frozenset({"attention.format"})
    bits: int = 4
    groups: int = 2
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise self.fail("bits", ", ".join(map(str, sorted(BITS, reverse=True))))
        if self.groups < 1:
            raise self.fail("groups", "1 or more groups of channels")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        why = cannot_pack(site, self.groups)
        if why is not None:
            return Skip(why)
        if not self.rotate:
            return spec.edited(by=self.name, format=Quantized(self.bits, self.groups)), f"rows in {self.bits} bits"
        widths = [int(value(operand).shape[-1]) for operand in site.new]
        if odd := [w for w in widths if w & (w - 1)]:
            return Skip(f"{odd[0]} channels are no power of two, which rotate=True needs")
        return spec.edited(by=self.name, format=Rotated(self.bits, self.groups)), f"turned rows in {self.bits} bits"


def cannot_pack(site: KVSite, groups: int) -> str | None:
    """Why the rows of a site cannot be packed in ``groups`` of channels, or None."""
    for name, operand in zip(("keys", "values"), site.new, strict=True):
        width = value(operand).shape[-1]
        if width % 8 or width % groups or (width // groups) % 4:
            return f"{name}: {width} channels do not divide into {groups} groups of whole bytes"
    return None
