"""The gradient filter: a chunk's gradient products over the columns that matter, and a tail of low rank for the rest.

docs/numerics.md has the formulas. In the logit gradients G (C, V) of a chunk, without the term of label smoothing, the
columns of likely vocabulary entries and of the targets are kept: products over them are a gather of the head's rows and
two small products. A few rank-one matrices with the same sums over rows and over columns replace the dropped columns.
The term of label smoothing has rank one already. The tails are added to the head's gradient once for all chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from chunked_ce.engine.products import add_product_
from chunked_ce.engine.specification import Specification
from chunked_ce.plan import GROUPS
from chunked_ce.rows import torch_filter
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import STATISTICS, RowStatistics, work_dtype

__all__ = [
    "MOST_DROPPED_OF_A_TOKEN",
    "MOST_KEPT",
    "Filter",
    "FilteredChunk",
    "GradientFilter",
    "can_filter",
    "groups_of",
]

_Kept = TypeVar("_Kept")  # the factors of a chunk's products

# The products are dense if more than this share of the columns is kept: the gathers would cost more than they save.
MOST_KEPT = 0.4
# They are also dense if more than this share of the probability would be dropped, in all or for one token: the tail's
# error is proportional to it. An untrained model would drop all of it. Models with 131,072 vocabulary entries, trained
# on 0.1 to 0.6 million tokens, dropped 3 to 6 %, and at most 17 to 42 % for one token.
_MOST_DROPPED = 0.1
MOST_DROPPED_OF_A_TOKEN = 0.5
_TAIL_PARTS = 3  # products of the two parts that are each of the tail's factors, less that of the small parts
_BUCKETS = 0x3F81  # of numbers up to 1 by exponent and 7 bits of mantissa, the upper half of their fp32 bits
_MASS = 2**40  # of the whole tail, in integers, whose sums do not depend on the order
_TINY = torch.finfo(torch.float32).tiny


class FilteredChunk(NamedTuple):
    """The factors of a chunk's products: some columns, or all, and a tail, ``left @ right.T``."""

    places: Tensor | None  # (K,), None for all columns
    gradients: Tensor  # (C, K), of kept columns with room behind them for the tail: (C, K + 3 * k)
    left: Tensor  # (C, k)
    right: Tensor  # (V, k), each column's sum about 1


class GradientFilter(Generic[_Kept]):
    """The filtered chunks of one loss."""

    holds_head = False  # whether the gradient of the weight is formed here, and not in a tensor of zeros
    total: Tensor | None = None  # (V, D) of dense chunks, or what is there already, where it is formed here

    def __init__(
        self,
        weight: Tensor,  # (V, D) in the products' dtype
        class_weight: Tensor | None,  # (V,)
        eps: float,
        share: float = 1.0,  # of the whole vocabulary that this rank holds
    ) -> None:
        self._weight = weight
        self._class_weight = class_weight
        self._eps = eps
        self._most_dropped = _MOST_DROPPED * share
        self._rights: list[Tensor] = []  # (V, k) of each chunk's tail
        self._lefts: list[Tensor] = []  # (k, D + 1): left.T @ [x, 1]

    def column_sums(self) -> ColumnSums:
        return ColumnSums(len(self._weight), work_dtype(self._weight.dtype), self._weight.device)

    def keep(
        self,
        gradients: Tensor,  # (C, V) without label smoothing
        columns: ColumnSums,
        target: Tensor,  # (C,) a column, -1 where it is in another shard
        slopes: RowStatistics,  # (C,) each
    ) -> _Kept | None:
        """The factors of the products. None means all columns and no tail, as for an untrained model."""
        raise NotImplementedError

    def hidden_gradient(self, kept: _Kept) -> Tensor:
        """The gradient of a chunk's hidden states, (C, D)."""
        raise NotImplementedError

    def add_head_gradients(
        self,
        weight: Tensor | None,  # (V, D)
        bias: Tensor | None,  # (V,)
        x: Tensor,  # (C, D)
        kept: _Kept,
        scale: Tensor | None = None,  # () factor of the sums; tails are stored without it
    ) -> None:
        """Add a chunk's kept columns to the gradients of weight and bias, and store its tail."""
        raise NotImplementedError

    def add_dense(self, gradients: Tensor, x: Tensor) -> None:
        """Nothing: the gradient of the weight takes the product of a dense chunk itself."""

    @property
    def sums(self) -> list[Tensor]:
        """Sums that are proportional to the scale of the logits' gradients: none, as tails are stored without it."""
        return []

    def finish(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add the tails of all chunks to the gradients of weight and bias."""
        raise NotImplementedError

    def _smoothing(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The term of label smoothing in the logit gradients, as ``left`` (C, 1) and ``right`` (V, 1)."""
        weights = slope.new_ones(len(self._weight)) if self._class_weight is None else self._class_weight
        most = torch.exp2(torch.log2(weights.abs().amax().clamp(min=_TINY)).ceil())  # weights of any size fit in fp16
        size = most * 2.0 ** len(weights).bit_length()  # a power of two, so that equal weights are not rounded
        return (slope * size).unsqueeze(1), (weights / size).unsqueeze(1)


class Filter(GradientFilter[FilteredChunk]):
    """The filter whose host knows a chunk's kept columns before it compacts them."""

    def keep(
        self,
        gradients: Tensor,  # (C, V) without label smoothing
        columns: ColumnSums,
        target: Tensor,  # (C,) a column, -1 where it is in another shard
        slopes: RowStatistics,  # (C,) each
    ) -> FilteredChunk | None:
        if gradients.numel() == 0:
            return None
        smoothing = None if slopes.weighted is None else self._smoothing(slopes.weighted)
        dense = None if smoothing is None else FilteredChunk(None, gradients, *smoothing)
        size = slopes.log_sum.abs()
        kept = columns.largest > self._eps * size.amax()
        kept[target[target >= 0]] = True
        index = kept.nonzero().squeeze(1)
        tail = columns.total.masked_fill(kept, 0)
        # Written so that a tail that is not finite is dense too, and shows in the gradients.
        if len(index) > MOST_KEPT * len(kept) or not tail.sum() <= self._most_dropped * size.sum():
            return dense
        group, right = groups_of(tail, kept)
        room = _TAIL_PARTS * (GROUPS + (smoothing is not None))
        picked, left = torch_filter.compact(gradients, index, group, GROUPS, len(index) + room)
        if not (left.abs().sum(1) <= MOST_DROPPED_OF_A_TOKEN * size).all():
            return dense
        if smoothing is not None:
            left, right = torch.cat([left, smoothing[0]], 1), torch.cat([right, smoothing[1]], 1)
        return FilteredChunk(index, picked, left, right)

    def hidden_gradient(self, kept: FilteredChunk) -> Tensor:
        weight, scale = self._weight, 2.0 ** (len(self._weight).bit_length() // 2)  # the rows fit in fp16
        rows, left = torch_filter.tail_rows(kept.right, weight) * scale, kept.left / scale
        if kept.places is None:
            tail, rest = _in_two(left @ rows, weight.dtype)
            return tail.addmm_(kept.gradients, weight).add_(rest)
        # One product, since kept columns and tail may cancel out; the tail in two parts, so that it is not rounded.
        (left, left_rest), (rows, rows_rest) = (_in_two(part, weight.dtype) for part in (left, rows))
        width, gradients = len(kept.places), kept.gradients
        factors = weight.new_empty(gradients.shape[1], weight.shape[1])
        torch.index_select(weight, 0, kept.places, out=factors[:width])
        torch.cat([rows, rows_rest, rows], out=factors[width:])
        gradients[:, width:] = torch.cat([left, left, left_rest], 1)
        return gradients @ factors

    def add_head_gradients(
        self,
        weight: Tensor | None,  # (V, D)
        bias: Tensor | None,  # (V,)
        x: Tensor,  # (C, D)
        kept: FilteredChunk,
        scale: Tensor | None = None,  # () factor of the sums; tails are stored without it
    ) -> None:
        if weight is None and bias is None:
            return
        if scale is not None:
            kept = kept._replace(left=kept.left / scale.to(kept.left.dtype))
        self._rights.append(kept.right)
        self._lefts.append(torch.cat([kept.left.t() @ x.to(kept.left.dtype), kept.left.sum(0).unsqueeze(1)], 1))
        gradients = kept.gradients if kept.places is None else kept.gradients[:, : len(kept.places)]
        if weight is not None:
            if kept.places is None:
                add_product_(weight, gradients.t(), x, first=False)
            else:
                part = weight.new_empty(len(kept.places), weight.shape[1])
                add_product_(part, gradients.t(), x, first=True)
                weight.index_add_(0, kept.places, part)
        if bias is not None:
            part = gradients.sum(0, dtype=bias.dtype)
            bias.index_add_(0, kept.places, part) if kept.places is not None else bias.add_(part)

    def finish(self, weight: Tensor | None, bias: Tensor | None) -> None:
        if not self._rights:
            return
        right = torch.cat(self._rights, 1)  # (V, sum of k)
        left = torch.cat(self._lefts)  # (sum of k, D + 1)
        if weight is not None:
            torch_filter.finish(weight, right, left[:, :-1])
        if bias is not None:
            torch_filter.finish(bias, right, left[:, -1])


def _in_two(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``values`` as a sum of two tensors in ``dtype``."""
    first = values.to(dtype)
    return first, (values - first).to(dtype)


def groups_of(
    total: Tensor,  # (V,) the sums of the dropped columns, 0 where kept
    kept: Tensor,  # (V,)
) -> tuple[Tensor, Tensor]:
    """The group of each dropped column, (V,) and -1 where kept, and each column's share of its group (V, g).

    Groups have about equal mass, from rare entries to frequent ones, which a histogram divides faster than sorting
    would: at the threshold of bf16 four of them left a third of the error of a single one, and took no longer.
    """
    share = total / total.sum().clamp(min=_TINY)
    bucket = (share.float().view(torch.int32) >> 16).clamp_(0, _BUCKETS - 1)  # NaN too
    mass = torch.zeros(_BUCKETS, dtype=torch.int64, device=total.device)
    reached = mass.index_add_(0, bucket, (share * _MASS).long()).cumsum(0)
    group = (reached * GROUPS // reached[-1].clamp(min=1)).clamp_(0, GROUPS - 1)[bucket]  # sums may round below 0
    right = total.new_zeros(len(total), GROUPS).scatter_(1, group.unsqueeze(1), total.unsqueeze(1))
    return group.masked_fill_(kept, -1), right / right.sum(0).clamp(min=_TINY)


def can_filter(specification: Specification, slopes: Iterable[str]) -> bool:
    """Whether a gradient filter is set, and a tail of low rank serves losses with ``slopes`` in these statistics.

    The slope of an entropy gives gradients of both signs, and under a softcap the term of label smoothing does not
    have rank one.
    """
    if specification.settings.gradient_filter is None:
        return False
    capped = specification.logits.softcap is not None
    return all(STATISTICS[name].low_rank and not (STATISTICS[name].adds and capped) for name in slopes)
