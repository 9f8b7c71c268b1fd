"""How many rows of logits are visited at a time, and in which dtype: the row kernels and the memory law share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunked_ce.light import LIGHT, torch

if TYPE_CHECKING or not LIGHT:
    from chunked_ce.rows.threads import num_threads
else:
    num_threads = torch.get_num_threads

__all__ = ["rows_in_flight", "rows_of_visit", "work_dtype"]

# Numbers of a visit on a CPU: few enough to stay in cache, yet worth the 0.1 ms that Python takes for their operations,
# in one thread at a time. On two cores with a second-level cache of 1 MiB each, twice as many took 0.8 of the time with
# V=50257, half as many 1.5.
_CACHED_ELEMENTS = 2**19
_DEVICE_ELEMENTS = 2**24  # on an accelerator a kernel must be worth its launch


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, loss and statistics for products in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_visit(vocab_size: int, device_type: str) -> int:
    """How many rows a thread visits at a time."""
    elements = _CACHED_ELEMENTS if device_type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // max(1, vocab_size))


def rows_in_flight(vocab_size: int, device_type: str) -> int:
    """How many rows all threads together visit at a time."""
    return rows_of_visit(vocab_size, device_type) * (num_threads() if device_type == "cpu" else 1)
