"""The tree keeps its rooms: a dozen modules a folder, and no module that is too long to read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("accelpass", "backends", "ir", "models_zoo", "passes")
MODULES = 12
"""In one folder, ``__init__`` not counted: a visitor sees them all at once."""
LINES = 400


def modules() -> list[Path]:
    return [p for house in SHIPPED for p in (ROOT / house).rglob("*.py") if house == p.relative_to(ROOT).parts[0]]


def test_no_folder_holds_more_than_a_dozen_modules() -> None:
    rooms = dict[str, int]()
    for module in modules():
        if module.name != "__init__.py":
            room = str(module.parent.relative_to(ROOT))
            rooms[room] = rooms.get(room, 0) + 1
    assert len(rooms) > 20
    assert {room: count for room, count in rooms.items() if count > MODULES} == {}


def test_no_module_is_longer_than_four_hundred_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > LINES} == {}
