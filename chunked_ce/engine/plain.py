"""The slow twin of both ways: plain differentiable torch on the full logits.

It serves what the chunked ways cannot: derivatives of derivatives and the transforms of ``torch.func``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.engine.linear import Head
from chunked_ce.engine.rows import Wanted, work_dtype
from chunked_ce.objective import Logits, Objective, RowStatistics, row_statistics

__all__ = ["linear_loss", "linear_statistics", "logits_statistics"]


def linear_loss(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    coefficient: Tensor,  # (N,)
    objective: Objective,
    ignore_index: int,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The sum of the losses, ()."""
    wanted = Wanted(weighted=objective.label_smoothing > 0)
    rows = linear_statistics(hidden, head, target, ignore_index, wanted, compute_dtype)
    losses = objective.token_losses(rows, target, ignore_index, head.class_weight, coefficient)
    return losses.sum().to(rows.log_sum.dtype)


def linear_statistics(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    ignore_index: int,
    wanted: Wanted,
    compute_dtype: torch.dtype,
) -> RowStatistics:
    """The statistics of every row, (N,) each and 0 where ignored."""
    hidden = hidden.where((target != ignore_index).unsqueeze(-1), 0)
    cast = head.to(compute_dtype)
    products = F.linear(hidden.to(compute_dtype), cast.weight, cast.bias)
    return logits_statistics(products, target, head.class_weight, head.logits, ignore_index, wanted)


def logits_statistics(
    products: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    ignore_index: int,
    wanted: Wanted,
) -> RowStatistics:
    """As `linear_statistics`, of products that exist."""
    counted = target != ignore_index
    z = logits(products.where(counted.unsqueeze(-1), 0).to(work_dtype(products.dtype)))
    found = row_statistics(z, target.where(counted, 0), class_weight, **wanted._asdict())
    return found.map(lambda part: part.where(counted, 0))
