"""The gradient filter: a chunk's gradient products over the columns that matter, and a low-rank tail for the rest.

In the logit gradients G (C, V) of a chunk most columns are words to which no token assigns probability. The columns K
with a probability above ``eps`` and those of the targets are kept; products over them alone are a gather of the head's
rows and two small products. Of the dropped columns T the products take instead of G_T the matrix of rank one with the
same sums over rows and over columns, (its mass per token) x (its mass per word) / (its mass):

    mass_i = sum_{v in T} G_iv        q_v = sum_i |G_iv| for v in T        M = sum_v q_v
    dX_i += mass_i / M * (q @ W)      dW_v += q_v / M * sum_i mass_i h_i

so that every row of the gradient sums to zero still, and rare words get a gradient. What label smoothing adds to a
dropped column is of rank one already. The words' side of the tails is applied to the head once for all chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine.columns import ColumnSums
from chunked_ce.engine.products import add_product_
from chunked_ce.engine.rows import Slopes, work_dtype

__all__ = ["GROUPS", "Filter", "Kept"]

# The products are dense where more than this share of the columns is kept: the gathers cost more than is saved.
_MOST_KEPT = 0.4
# And where more than this share of the probability would be dropped, all of it by a model that knows nothing yet: the
# error of the tail is in proportion to it.
_MOST_DROPPED = 0.25
GROUPS = 4
_TINY = torch.finfo(torch.float32).tiny


class Kept(NamedTuple):
    """A chunk whose products run over the columns ``index``, and its tail: ``left`` times ``right``."""

    index: Tensor  # (K,)
    gradients: Tensor  # (C, K)
    left: Tensor  # (C, k)
    right: Tensor  # (V, k) 0 where kept


class Filter:
    """The filtered chunks of one loss."""

    def __init__(
        self,
        weight: Tensor,  # (V, D) in the products' dtype
        class_weight: Tensor | None,  # (V,)
        eps: float,
    ) -> None:
        self._weight = weight
        self._class_weight = class_weight
        self._eps = eps
        self._rights: list[Tensor] = []  # (V, k) of each chunk's tail
        self._lefts: list[Tensor] = []  # (k, D + 1): left.T @ [x, 1]

    def new_columns(self) -> ColumnSums:
        return ColumnSums(len(self._weight), work_dtype(self._weight.dtype), self._weight.device)

    def keep(
        self,
        gradients: Tensor,  # (C, V)
        columns: ColumnSums,
        target: Tensor,  # (C,) a column
        here: Tensor | None,  # (C,) whether the target is one of the columns
        slopes: Slopes,  # (C,) each
    ) -> Kept | None:
        """The columns to keep; None where the products are to be dense, as of a model that is not trained yet."""
        if gradients.numel() == 0:
            return None
        kept = columns.largest > self._eps * slopes.log_sum.abs().amax()
        kept[target if here is None else target[here]] = True
        index = kept.nonzero().squeeze(1)
        if len(index) > _MOST_KEPT * len(kept):
            return None
        tail = columns.total.masked_fill(kept, 0)
        if tail.sum() > _MOST_DROPPED * slopes.log_sum.abs().sum():
            return None
        groups, right = _groups(tail, kept)
        left = (gradients @ groups.to(gradients.dtype)).to(right.dtype)
        if slopes.weighted is not None:
            words = (~kept).to(right.dtype) if self._class_weight is None else self._class_weight.masked_fill(kept, 0)
            smoothing = slopes.weighted.unsqueeze(1)
            left = torch.cat([left - smoothing * (words @ groups), smoothing], 1)
            right = torch.cat([right, words.unsqueeze(1)], 1)
        picked = gradients.gather(1, index.expand(len(gradients), -1))
        return Kept(index, picked, left, right)

    def hidden_gradient(self, kept: Kept) -> Tensor:
        """The gradient of a chunk's hidden states, (C, D)."""
        weight = self._weight
        scale = 2.0 ** (len(weight).bit_length() // 2)  # keeps 1 / V in the range of fp16
        words = (kept.right.t() * scale).to(weight.dtype) @ weight  # (k, D)
        tail = (kept.left / scale).to(weight.dtype) @ words
        return tail.addmm_(kept.gradients, weight.index_select(0, kept.index))

    def add_head_gradients(
        self,
        weight: Tensor | None,  # (V, D)
        bias: Tensor | None,  # (V,)
        x: Tensor,  # (C, D)
        kept: Kept,
    ) -> None:
        """Add a chunk's kept columns to the gradients of weight and bias, and remember its tail."""
        self._rights.append(kept.right)
        self._lefts.append(torch.cat([kept.left.t() @ x.to(kept.left.dtype), kept.left.sum(0).unsqueeze(1)], 1))
        if weight is not None:
            part = weight.new_empty(len(kept.index), weight.shape[1])
            add_product_(part, kept.gradients.t(), x, first=True)
            weight.index_add_(0, kept.index, part)
        if bias is not None:
            bias.index_add_(0, kept.index, kept.gradients.sum(0, dtype=bias.dtype))

    def finish(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add the tails of all chunks to the gradients of weight and bias."""
        if not self._rights:
            return
        right = torch.cat(self._rights, 1)  # (V, sum of k)
        left = torch.cat(self._lefts)  # (sum of k, D + 1)
        if weight is not None:
            weight.addmm_(right.to(weight.dtype), left[:, :-1].to(weight.dtype))
        if bias is not None:
            bias.addmv_(right.to(bias.dtype), left[:, -1].to(bias.dtype))


def _groups(
    total: Tensor,  # (V,) the sums of the dropped columns, 0 where kept
    kept: Tensor,  # (V,)
) -> tuple[Tensor, Tensor]:
    """Which dropped columns are in which group, as zeros and ones (V, g), and each one's share of it (V, g).

    Groups are of equal mass, from rare words to frequent ones: at the threshold of bf16 four of them left a third of
    the error that one leaves, and took no longer.
    """
    order = total.argsort()
    reached = total[order].cumsum(0)
    group = torch.empty_like(order)
    group[order] = (reached / reached[-1].clamp(min=_TINY) * GROUPS).long().clamp_(max=GROUPS - 1)
    groups = total.new_zeros(len(total), GROUPS).scatter_(1, group.unsqueeze(1), 1)
    groups[kept] = 0
    share = groups * total.unsqueeze(1)
    return groups, share / share.sum(0).clamp(min=_TINY)
