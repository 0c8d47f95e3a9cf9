"""Text that commands read: a file that the user names, or the prose that every Python ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from accelpass.cli.terminal import UsageMistake

DataOption = Annotated[
    Path | None, typer.Option("--data", help="A text file; without, the reference text that comes with Python.")
]


def checked(path: Path | None) -> None:
    """Refuse a file that is not there before a model is loaded."""
    if path is not None and not path.is_file():
        raise UsageMistake(f"--data {path}: there is no such file")


def ids_of(tokenizer: Any, path: Path | None) -> Any:
    """The whole text as ids ``(1, tokens)``."""
    if tokenizer is None:
        raise UsageMistake("the model has no tokenizer, so no text can be read")
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
    else:
        text = path.read_text()
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids
