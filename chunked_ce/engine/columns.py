"""What the gradient filter asks of the columns of a chunk's logit gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ColumnSums", "column_sums"]


class ColumnSums:
    """What the filter asks of the columns of a chunk's gradients, without targets and label smoothing.

    The row kernels call `add` with each few rows while they are in cache; `column_sums` is the slow twin.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.zeros(vocab_size, dtype=dtype, device=device)  # (V,) of |G_iv| over the rows
        self.total = torch.zeros(vocab_size, dtype=dtype, device=device)  # (V,) the sum of |G_iv|

    def add(
        self,
        gradients: Tensor,  # (r, V)
        slope: Tensor,  # (r,) of the loss in the log-sum-exp: the sign of the gradients
    ) -> None:
        if slope.device.type == "cpu" and not (slope < 0).any():
            for row in gradients:  # faster than a reduction over few long rows
                torch.maximum(self.largest, row, out=self.largest)
        else:
            torch.maximum(self.largest, gradients.abs().amax(0), out=self.largest)
        self.total.addmv_(gradients.t(), slope.sign())


def column_sums(
    gradients: Tensor,  # (C, V) before targets and label smoothing
    slope: Tensor,  # (C,)
) -> ColumnSums:
    """`ColumnSums` of a chunk at once: the twin of what the row kernels add up."""
    found = ColumnSums(gradients.shape[1], slope.dtype, gradients.device)
    wide = gradients.to(slope.dtype)
    found.largest = wide.abs().amax(0)
    found.total = (wide * slope.sign().unsqueeze(-1)).sum(0)
    return found
