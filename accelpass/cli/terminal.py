"""What every command does alike: progress on stderr, mistakes in one line, exit codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

OK, FAILURE, MISTAKE, INTERRUPTED = 0, 1, 2, 130
stderr = Console(stderr=True, highlight=False)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can do something about into one line and an exit code.

    A mistake (option, model, file) is 2, a failure 1; an error that nobody foresaw keeps its traceback, for the report.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Dynamo wraps what a backend raises.
            cause = getattr(error, "inner_exception", None) or error
            code = _code(cause)
            if code is None:
                raise
            _say(str(cause))
            raise typer.Exit(code) from None

    return run


def _code(error: BaseException) -> int | None:
    from accelpass.ir.errors import AccelpassError, OptionError
    from accelpass.models_zoo import ZooError

    if isinstance(error, OptionError | ZooError | UsageMistake):
        return MISTAKE
    if isinstance(error, AccelpassError | OSError):
        return FAILURE
    return None


class UsageMistake(ValueError):
    """The command cannot do what was asked of it; says what would be right."""


def _say(what: str) -> None:
    stderr.print(Text.assemble(("accelpass: ", "bold red"), what), soft_wrap=True)


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Callable[[str | int], None]]:
    """Show that something takes its time; what it yields takes a new title, or how many of ``total`` are done.

    Where stderr is no terminal each title is one line, so that a log tells where the time went.
    """
    if not stderr.is_terminal:
        stderr.print(title, markup=False)
        yield lambda news: stderr.print(news, markup=False) if isinstance(news, str) else None
        return
    middle = (BarColumn(),) if total is not None else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *middle, TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def update(news: str | int) -> None:
            if isinstance(news, str):
                progress.update(task, description=news)
            else:
                progress.update(task, completed=news)

        yield update
