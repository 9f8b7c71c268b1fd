"""What commands print on: the terminal, tables, and a bar for whatever takes longer than some seconds."""

from __future__ import annotations

from collections.abc import Container
from typing import NoReturn

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["progress_bar", "simple_table", "wide_console"]


class _PipeConsole(Console):
    """A console whose reader may go away: the command ends, as `chunked_ce.cli.main` says, not with exit code 1."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def wide_console(*, stderr: bool = False) -> Console:
    """The terminal; in a file or a pipe, wide enough for the tables."""
    console = _PipeConsole(stderr=stderr, highlight=False)
    return console if console.is_terminal else _PipeConsole(stderr=stderr, highlight=False, width=130)


def simple_table(title: str, columns: tuple[str, ...], *, left: Container[str], caption: str | None = None) -> Table:
    """An empty table; columns are aligned to the right but for those in ``left``."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def progress_bar(console: Console) -> Progress:
    """A bar with its description, the steps that are done and the time so far."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)
