"""The columns of what ``chunked-ce bench`` measured."""

from __future__ import annotations

from chunked_ce.cli.documents import Result, status_of

__all__ = ["COLUMNS", "cells"]

COLUMNS = (
    "implementation",
    "seconds",
    "x products",
    "least",
    "most",
    "peak MiB",
    "law MiB",
    "dX error",
    "dW error",
    "",
)
_NUMBERS = {  # by name in a result, in the order of the columns
    "seconds": ".4g",
    "ratio": ".2f",
    "ratio_least": ".2f",
    "ratio_most": ".2f",
    "peak_mib": ",.0f",
    "predicted_mib": ",.0f",
    "hidden_grad_relative_error": ".1e",
    "weight_grad_relative_error": ".1e",
}


def cells(result: Result) -> list[str]:
    """A result as text, in the order of `COLUMNS`."""
    numbers = ("-" if result.get(key) is None else format(result[key], form) for key, form in _NUMBERS.items())
    return [str(result["implementation"]), *numbers, status_of(result)]
