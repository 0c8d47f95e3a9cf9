"""``python -m tests.gpu_kernels --write docs/gpu-kernels.md``: compile everything, and tell what it takes of each chip."""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from pathlib import Path

from tests.gpu_kernels.machine_code import CHIPS, Chip, compiled, taken
from tests.gpu_kernels.sources import Variant, variants
from tests.resumable import Notes, bar

NOTES = Notes("gpu_kernels")
HEAD = """# GPU kernels, compiled ahead of time

Every Triton kernel of the library with every config that it is tuned over, at the dtypes, head sizes and groups in use, compiled to
machine code for four chips (`make gpu-compile`; no GPU is needed, and none was used). A config that takes more shared memory than a
chip gives one program is passed over by the tuner there. Registers are those of a thread; what was spilled is in bytes on NVIDIA
and in registers on AMD.

"""


def measured(variant: Variant, chip: Chip) -> dict[str, object]:
    """What a kernel takes of a chip, or why it does not compile."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = taken(compiled(variant, chip), chip)
    except Exception as cause:  # whatever Triton or an assembler raises is what is to be shown
        return {"error": f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"}
    told = [*found.warnings, *(str(w.message) for w in said)]
    return {"shared": found.shared, "registers": found.registers, "spilled": found.spilled, "warnings": told}


def table(rows: dict[str, dict[str, object]], chosen: list[Variant]) -> str:
    """One table: a row for each kernel and setting, the configs that fit of all, and the range of what they take."""
    groups: dict[tuple[str, str], list[Variant]] = defaultdict(list)
    for variant in chosen:
        groups[variant.name, variant.setting].append(variant)
    lines = [
        "| kernel | compiled for | " + " | ".join(chip.name for chip in CHIPS) + " |",
        "|" + "---|" * (2 + len(CHIPS)),
    ]
    for (name, setting), members in groups.items():
        cells = []
        for chip in CHIPS:
            found = [rows[f"{v.key} | {chip.name}"] for v in members]
            fit = [f for f in found if "error" not in f and int(str(f["shared"])) <= chip.shared]
            text = f"{len(fit)} of {len(members)} fit"
            if fit:
                text += f"; {_range(fit, 'registers')} registers, {_range(fit, 'shared', 1024)} kB"
                spilling = sum(int(str(f["spilled"])) > 0 for f in fit)
                text += f"; {spilling} spill up to {max(int(str(f['spilled'])) for f in fit)}" if spilling else ""
            cells.append(text)
        lines.append(f"| `{name.strip('_')}` | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(rows: dict[str, dict[str, object]], chosen: list[Variant]) -> str:
    """What did not compile, what the compilers warned of, and configs that fit no chip."""
    lines = []
    for key, row in rows.items():
        if "error" in row:
            lines.append(f"- {key}: {row['error']}")
        lines += [f"- {key}: {text}" for text in row.get("warnings", [])]  # type: ignore[attr-defined]
    for variant in chosen:
        found = [(rows[f"{variant.key} | {chip.name}"], chip) for chip in CHIPS]
        if not any("error" not in row and int(str(row["shared"])) <= chip.shared for row, chip in found):
            lines.append(f"- {variant.key}: fits no chip")
    return (
        "\n".join(lines) + "\n"
        if lines
        else "Nothing failed to compile, no compiler warned, and every config fits a chip.\n"
    )


def _range(found: list[dict[str, object]], key: str, unit: int = 1) -> str:
    numbers = [-(-int(str(f[key])) // unit) for f in found]
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a page of documentation to write")
    parser.add_argument("--fresh", action="store_true", help="compile again what an interrupted run has compiled")
    asked = parser.parse_args()
    chosen = list(variants())
    if asked.fresh:
        NOTES.end()
    rows: dict[str, dict[str, object]] = {row["key"]: row for row in NOTES.rows()}
    work = [(v, c) for v in chosen for c in CHIPS if f"{v.key} | {c.name}" not in rows]
    total = len(chosen) * len(CHIPS)
    with bar("kernels", total, total - len(work)) as shown:
        for variant, chip in work:
            key = f"{variant.key} | {chip.name}"
            rows[key] = {"key": key, **measured(variant, chip)}
            NOTES.add(rows[key])
            shown.advance()
    page = HEAD + table(rows, chosen) + "\n## Findings\n\n" + findings(rows, chosen)
    if asked.write:
        asked.write.write_text(page)
    NOTES.end()
    print(page if not asked.write else f"{len(rows)} compilations; see {asked.write}")
    if any("error" in row for row in rows.values()):
        raise SystemExit("some kernels do not compile; see the findings")


if __name__ == "__main__":
    main()
