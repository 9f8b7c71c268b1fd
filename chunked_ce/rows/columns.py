"""Sums over the columns of a chunk's logit gradients, by which the gradient filter chooses columns."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ColumnSums"]


class ColumnSums:
    """The largest and the summed size of each column of a chunk's gradients, without targets and label smoothing.

    The row kernels call `add` for a few rows at a time, while they are in cache.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.zeros(vocab_size, dtype=dtype, device=device)  # (V,) of |G_iv| over the rows
        self.total = torch.zeros(vocab_size, dtype=dtype, device=device)  # (V,) the sum of |G_iv|

    def empty(self) -> ColumnSums:
        """Sums of no rows, to be merged later."""
        return ColumnSums(len(self.total), self.total.dtype, self.total.device)

    def merge(self, others: Iterable[ColumnSums]) -> None:
        """Add the sums of other rows."""
        for other in others:
            torch.maximum(self.largest, other.largest, out=self.largest)
            self.total += other.total

    def add(
        self,
        gradients: Tensor,  # (r, V)
        slope: Tensor,  # (r,) of the loss in the log-sum-exp, whose sign the gradients have
    ) -> None:
        if slope.device.type == "cpu" and not (slope < 0).any():
            for row in gradients:  # faster than a reduction over few long rows
                torch.maximum(self.largest, row, out=self.largest)
        else:
            torch.maximum(self.largest, gradients.abs().amax(0), out=self.largest)
        self.total.addmv_(gradients.t(), slope.sign())
