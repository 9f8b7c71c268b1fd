"""Numbers for people."""

from __future__ import annotations

__all__ = ["GIB", "MIB", "bytes_text", "threads_text"]

MIB, GIB = 2**20, 2**30


def bytes_text(size: float) -> str:
    """
    >>> bytes_text(3 * 2**30), bytes_text(2**20), bytes_text(100)
    ('3.00 GiB', '1.0 MiB', '0.0 MiB')
    """
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def threads_text(number: int) -> str:
    """
    >>> threads_text(1), threads_text(2)
    ('1 thread', '2 threads')
    """
    return f"{number} thread{'s' if number != 1 else ''}"
