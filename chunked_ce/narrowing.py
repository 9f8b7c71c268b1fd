"""Values that cannot be None where they are read, as type checkers need to hear."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["not_none"]

_Value = TypeVar("_Value")


def not_none(value: _Value | None) -> _Value:
    """``value``, which is never None at the call: the statistic was asked for, or the call has a teacher, say."""
    assert value is not None
    return value
