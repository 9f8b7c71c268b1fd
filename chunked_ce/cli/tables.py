"""Tables for people: the console that they are printed on, and the columns of what ``chunked-ce bench`` measured."""

from __future__ import annotations

from collections.abc import Container

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from chunked_ce.cli.implementations import LOSSES

__all__ = ["COLUMNS", "cells", "simple_table", "wide_console"]

COLUMNS = ("contestant", "seconds", "x products", "least", "most", "peak MiB", "law MiB", "dX error", "dW error", "")
_NUMBERS = {  # by name in a result, in the order of the columns
    "seconds": ".4g",
    "ratio": ".2f",
    "ratio_least": ".2f",
    "ratio_most": ".2f",
    "peak_mib": ",.0f",
    "predicted_mib": ",.0f",
    "hidden_grad_error": ".1e",
    "weight_grad_error": ".1e",
}


def cells(result: dict[str, object]) -> list[str]:
    """A result as text, in the order of `COLUMNS`."""
    name, status = str(result["contestant"]), str(result["status"])
    numbers = ("-" if result.get(key) is None else format(result[key], form) for key, form in _NUMBERS.items())
    return [LOSSES[name].key if name in LOSSES else name, *numbers, "" if status == "ok" else status]


def wide_console(*, stderr: bool = False) -> Console:
    """The terminal; in a file or a pipe, wide enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=120)


def simple_table(title: str, columns: tuple[str, ...], *, left: Container[str], caption: str | None = None) -> Table:
    """An empty table; columns are aligned to the right but for those in ``left``."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
