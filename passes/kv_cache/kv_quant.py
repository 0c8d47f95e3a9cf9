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
from accelpass.passes.kv_cache.storage.channel_blocks import ChannelBlocks


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
        per_channel_keys: round keys as KIVI does: a step and a lowest value for each channel of ``block`` tokens, as some channels
            of keys are large throughout. Keys and values of the newest tokens stay as they are; nothing can be evicted beside.
        window: then, how many those are: values of this many tokens, keys of fewer, until as many have come. 128 in the paper.
        block: then, tokens that share a step; 32 in the paper. ``groups`` is of values.

    Raises:
        OptionError: other bits, no group, a window that is no number of blocks, or both kinds of keys.
    """

    name: ClassVar[str] = "kv_quant"
    summary: ClassVar[str] = "keys and values of a KVCache in 8, 4, 3 or 2 bits, rounded by token and group of channels"
    paper: ClassVar[str] = (
        "the rounding of MiKV, arXiv 2402.18096; rotate: Ashkboos et al. 2024, QuaRot, arXiv 2404.00456; per_channel_keys: "
        "Liu et al. 2024, KIVI, arXiv 2402.02750, algorithm 1"
    )
    edits: ClassVar[frozenset[str]] = frozenset({"attention.format"})
    bits: int = 4
    groups: int = 2
    rotate: bool = False
    per_channel_keys: bool = False
    window: int = 128
    block: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise self.fail("bits", ", ".join(map(str, sorted(BITS, reverse=True))))
        if self.groups < 1:
            raise self.fail("groups", "1 or more groups of channels")
        if self.block < 1 or self.window < self.block or self.window % self.block:
            raise self.fail("window", f"a multiple of block={self.block}")
        if self.rotate and self.per_channel_keys:
            raise self.fail("rotate", "False with per_channel_keys: turned channels are all alike")
        self.check_sites()

    def aspects(self, site: KVSite) -> frozenset[str]:
        return self.edits | ({"attention.rows"} if self.per_channel_keys else set())

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        why = cannot_pack(site, self.groups)
        if why is not None:
            return Skip(why)
        if self.per_channel_keys:
            store = ChannelBlocks(self.bits, self.block, self.window, self.groups)
            said = f"keys by channel and values by token in {self.bits} bits, the newest {self.window} as they are"
            return spec.edited(by=self.name, store=store), said
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
