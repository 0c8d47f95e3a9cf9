"""A sample of `make gpu-compile`: one config of each kernel for each chip, and what is read off the machine code."""

import pytest

from tests.gpu_kernels.__main__ import findings, measured, table
from tests.gpu_kernels.machine_code import CHIPS
from tests.gpu_kernels.sources import WEIGHT_ONLY, variants

EACH = list({v.name: v for v in variants()}.values())


def test_every_kernel_is_among_the_variants():
    assert {v.name for v in EACH} == {*WEIGHT_ONLY, "kv_split", "block_sparse", "_kv_merge", "_kv_mass"}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_each_kernel_compiles_for_each_chip(chip):
    small = [v for v in EACH if "gemm" not in v.name and v.name != "block_sparse"]
    for variant in small[:: 1 if chip is CHIPS[1] else 2]:
        found = measured(variant, chip)
        assert "error" not in found, found
        assert not found["warnings"]
        assert 0 < found["registers"] <= 512
        if (
            chip.target.backend == "cuda"
        ):  # configs were chosen for these; the tuner passes over what does not fit a chip
            assert found["shared"] <= chip.shared


def test_the_table_counts_what_fits():
    variant = EACH[0]
    rows = {f"{variant.key} | {c.name}": {"shared": c.shared + 1, "registers": 9, "spilled": 0} for c in CHIPS[:1]}
    rows |= {f"{variant.key} | {c.name}": {"shared": 2048, "registers": 9, "spilled": 4} for c in CHIPS[1:3]}
    rows |= {f"{variant.key} | {c.name}": {"error": "no"} for c in CHIPS[3:]}
    text = table(rows, [variant])
    assert "| 0 of 1 fit | 1 of 1 fit; 9 registers, 2 kB; 1 spill up to 4 |" in text
    assert "no" in findings(rows, [variant])
