"""The gradient filter: a chunk's gradient products over the columns that matter, and a tail of low rank for the rest.

docs/numerics.md has the formulas. In the logit gradients G (C, V) of a chunk, without what label smoothing adds, the
columns of likely words and of the targets are kept: products over them are a gather of the head's rows and two small
products. In place of the dropped columns the products take a few matrices of rank one with the same sums over rows and
over columns. What label smoothing adds to all columns is of rank one already. The words' side of these tails meets
the head's gradient once for all chunks.
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
# And where more than this share of the probability would be dropped, or of that of one token: the error of the tail
# is in proportion to it. A model that knows nothing yet drops all of it. Models of 131,072 words trained on 0.1 to 0.6
# million tokens dropped 3 to 6 %, and of one token 17 to 42 %.
_MOST_DROPPED = 0.1
_MOST_DROPPED_OF_A_TOKEN = 0.5
GROUPS = 4
_SUMMED_WORDS = 4096  # whose share of the tail is rounded before it is added
_TINY = torch.finfo(torch.float32).tiny


class Kept(NamedTuple):
    """What the products of a chunk run over: some columns, or all, and a tail, ``left`` times ``right``."""

    index: Tensor | None  # (K,), None for all columns
    gradients: Tensor  # (C, K)
    left: Tensor  # (C, k)
    right: Tensor  # (V, k), each column's sum about 1


class Filter:
    """The filtered chunks of one loss."""

    def __init__(
        self,
        weight: Tensor,  # (V, D) in the products' dtype
        class_weight: Tensor | None,  # (V,)
        eps: float,
        share: float = 1.0,  # of the whole vocabulary that the columns are
    ) -> None:
        self._weight = weight
        self._class_weight = class_weight
        self._eps = eps
        self._most_dropped = _MOST_DROPPED * share
        self._rights: list[Tensor] = []  # (V, k) of each chunk's tail
        self._lefts: list[Tensor] = []  # (k, D + 1): left.T @ [x, 1]

    def new_columns(self) -> ColumnSums:
        return ColumnSums(len(self._weight), work_dtype(self._weight.dtype), self._weight.device)

    def keep(
        self,
        gradients: Tensor,  # (C, V) without label smoothing
        columns: ColumnSums,
        target: Tensor,  # (C,) a column, -1 where it is none of these
        slopes: Slopes,  # (C,) each
    ) -> Kept | None:
        """What the products run over. None is all columns and no tail, as of a model that is not trained yet."""
        if gradients.numel() == 0:
            return None
        smoothing = None if slopes.weighted is None else self._smoothing(slopes.weighted)
        dense = None if smoothing is None else Kept(None, gradients, *smoothing)
        size = slopes.log_sum.abs()
        kept = columns.largest > self._eps * size.amax()
        kept[target[target >= 0]] = True
        index = kept.nonzero().squeeze(1)
        tail = columns.total.masked_fill(kept, 0)
        # In this form a tail that is not finite is dense too, and says so in the gradients.
        if len(index) > _MOST_KEPT * len(kept) or not tail.sum() <= self._most_dropped * size.sum():
            return dense
        groups, right = _groups(tail, kept)
        left = (gradients @ groups.to(gradients.dtype)).to(right.dtype)
        if not (left.abs().sum(1) <= _MOST_DROPPED_OF_A_TOKEN * size).all():
            return dense
        if smoothing is not None:
            left, right = torch.cat([left, smoothing[0]], 1), torch.cat([right, smoothing[1]], 1)
        return Kept(index, gradients.gather(1, index.expand(len(gradients), -1)), left, right)

    def _smoothing(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """What label smoothing adds to the logit gradients, as ``left`` (C, 1) and ``right`` (V, 1)."""
        words = slope.new_ones(len(self._weight)) if self._class_weight is None else self._class_weight
        largest = torch.exp2(torch.log2(words.abs().amax().clamp(min=_TINY)).ceil())  # weights of all sizes fit in fp16
        size = largest * 2.0 ** len(words).bit_length()  # a power of two: what is equal for all words is not rounded
        return (slope * size).unsqueeze(1), (words / size).unsqueeze(1)

    def hidden_gradient(self, kept: Kept) -> Tensor:
        """The gradient of a chunk's hidden states, (C, D)."""
        weight = self._weight
        scale = 2.0 ** (len(weight).bit_length() // 2)  # keeps 1 / V in the range of fp16
        right, left = kept.right.t() * scale, kept.left / scale
        words = right.new_zeros(len(right), weight.shape[1])  # (k, D)
        for start in range(0, len(weight), _SUMMED_WORDS):
            block = slice(start, start + _SUMMED_WORDS)
            words += right[:, block].to(weight.dtype) @ weight[block]
        if kept.index is None:
            tail, rest = _in_two(left @ words, weight.dtype)
            return tail.addmm_(kept.gradients, weight).add_(rest)
        # One product, since kept columns and tail may cancel out; the tail in two parts, as if it were not rounded.
        (left, left_rest), (words, words_rest) = (_in_two(part, weight.dtype) for part in (left, words))
        gradients = torch.cat([kept.gradients, left, left, left_rest], 1)
        return gradients @ torch.cat([weight.index_select(0, kept.index), words, words_rest, words])

    def add_head_gradients(
        self,
        weight: Tensor | None,  # (V, D)
        bias: Tensor | None,  # (V,)
        x: Tensor,  # (C, D)
        kept: Kept,
        scale: Tensor | None = None,  # () of what is added; the tails are without it
    ) -> None:
        """Add a chunk's kept columns to the gradients of weight and bias, and remember its tail."""
        if weight is None and bias is None:
            return
        if scale is not None:
            kept = kept._replace(left=kept.left / scale.to(kept.left.dtype))
        self._rights.append(kept.right)
        self._lefts.append(torch.cat([kept.left.t() @ x.to(kept.left.dtype), kept.left.sum(0).unsqueeze(1)], 1))
        if weight is not None:
            if kept.index is None:
                add_product_(weight, kept.gradients.t(), x, first=False)
            else:
                part = weight.new_empty(len(kept.index), weight.shape[1])
                add_product_(part, kept.gradients.t(), x, first=True)
                weight.index_add_(0, kept.index, part)
        if bias is not None:
            part = kept.gradients.sum(0, dtype=bias.dtype)
            bias.index_add_(0, kept.index, part) if kept.index is not None else bias.add_(part)

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


def _in_two(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``values`` as a sum of two tensors in ``dtype``."""
    first = values.to(dtype)
    return first, (values - first).to(dtype)


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
    group[order] = (reached / reached[-1].clamp(min=_TINY) * GROUPS).long().clamp_(0, GROUPS - 1)
    groups = total.new_zeros(len(total), GROUPS).scatter_(1, group.unsqueeze(1), 1)
    groups[kept] = 0
    share = groups * total.unsqueeze(1)
    return groups, share / share.sum(0).clamp(min=_TINY)
