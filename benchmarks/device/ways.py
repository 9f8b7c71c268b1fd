"""Ways that the library chooses between by itself, forced: for comparisons only."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from chunked_ce.engine import exponential_products

__all__ = ["one_pass", "two_passes"]


def two_passes() -> AbstractContextManager:
    """Statistics and gradients in two passes over the logits, also where one would do."""
    return mock.patch.object(exponential_products, "_kernels", return_value=None)


def one_pass() -> AbstractContextManager:
    """One pass wherever it is right, also where it is thought to be slower."""
    return mock.patch.object(exponential_products, "_saves_traffic", return_value=True)
