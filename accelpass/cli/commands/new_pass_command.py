"""What ``accelpass new-pass`` writes: a package with one working pass, for an author to go on from."""

from __future__ import annotations

import keyword
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelpass.cli.terminal import UsageMistake

FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "src/{module}/__init__.py": "init.py.j2",
    "src/{module}/{name}.py": "pass.py.j2",
    "tests/test_{name}.py": "test.py.j2",
}


@dataclass(frozen=True)
class Names:
    """What a pass of one name is called in each place."""

    name: str

    @property
    def package(self) -> str:
        return f"accelpass-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        return f"accelpass_{self.name}"

    @property
    def class_name(self) -> str:
        return "".join(word[:1].upper() + word[1:] for word in self.name.split("_"))


def checked(name: str) -> Names:
    """The names for a pass.

    Raises:
        UsageMistake: it is no name for a pass, or one that is taken; says what would be right.
    """
    from accelpass.passes.core.registry import NAME, package_of, registered

    if not NAME.fullmatch(name) or not name.strip("_") or keyword.iskeyword(name):
        near = "".join(c if c.isalnum() else "_" for c in name.lower().strip()).strip("_0123456789")
        hint = (
            f", for example {near}" if NAME.fullmatch(near) and not keyword.iskeyword(near) and near.isascii() else ""
        )
        raise UsageMistake(
            f"{name!r} is not a name for a pass; use lower-case letters, digits and _, with a letter first{hint}"
        )
    taken = registered().get(name)
    if taken is not None:
        raise UsageMistake(f"{package_of(taken)} has a pass named {name!r} already; choose another name")
    return Names(name)


def target(names: Names, directory: Path | None) -> Path:
    """The folder to write.

    Raises:
        UsageMistake: it is a file, or a folder that is not empty.
    """
    folder = (directory or Path(names.package)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageMistake(f"{folder} is a file; give another --directory")
    if folder.exists() and any(folder.iterdir()):
        raise UsageMistake(f"the folder {folder} is not empty; give another --directory, or empty it first")
    return folder


def write(names: Names, folder: Path) -> list[Path]:
    """Write the package; returns its files. Nothing stays behind if the disk refuses one of them."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("accelpass", "templates/new_pass"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    given = {
        "name": names.name,
        "package": names.package,
        "module": names.module,
        "class_name": names.class_name,
        "version": version("accelpass"),
    }
    made = {
        folder / path.format(**given): templates.get_template(template).render(given)
        for path, template in FILES.items()
    }
    was_there = folder.is_dir()
    try:
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError:
        for left in list(folder.iterdir()) if was_there else [folder]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        raise
    return list(made)


def next_steps(folder: Path, files: Sequence[Path]) -> str:
    """What to type now."""
    shown = "\n".join(f"  {path}" for path in files)
    return (
        f"wrote {folder}:\n{shown}\n\n"
        f"cd {folder}\n"
        "pip install --no-deps --no-build-isolation --editable .\n"
        "python -m pytest\n"
    )
