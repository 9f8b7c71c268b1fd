"""The columns of what ``chunked-ce bench`` measured."""

from __future__ import annotations

from collections.abc import Sequence

from chunked_ce.cli.documents import Result, status_of

__all__ = ["COLUMNS", "cells", "columns_of"]

COLUMNS = (
    "implementation",
    "seconds",
    "x products",
    "least",
    "most",
    "peak MiB",
    "law MiB",
    "sent MiB",
    "dX error",
    "dW error",
    "",
)
_NUMBERS = {  # by column: its name in a result, and its form
    "seconds": ("seconds", ".4g"),
    "x products": ("ratio", ".2f"),
    "least": ("ratio_least", ".2f"),
    "most": ("ratio_most", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "law MiB": ("predicted_mib", ",.0f"),
    "sent MiB": ("sent_mib", ",.1f"),
    "dX error": ("hidden_grad_relative_error", ".1e"),
    "dW error": ("weight_grad_relative_error", ".1e"),
}
_OF_RANKS, _OF_ONE_PROCESS = ("sent MiB",), ("dX error", "dW error")


def columns_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Those of `COLUMNS` that the results have: ranks send bytes, and are not compared with float64.

    >>> columns_of([{"implementation": "full logits"}]) == tuple(name for name in COLUMNS if name != "sent MiB")
    True
    """
    is_ranked = any(row.get("ranks") for row in results)
    without = _OF_ONE_PROCESS if is_ranked else _OF_RANKS
    return tuple(name for name in COLUMNS if name not in without)


def cells(result: Result, columns: Sequence[str] = COLUMNS) -> list[str]:
    """A result as text, in the order of the columns."""
    numbers = []
    for name in columns[1:-1]:
        key, form = _NUMBERS[name]
        numbers.append("-" if result.get(key) is None else format(result[key], form))
    return [str(result["implementation"]), *numbers, status_of(result)]
