"""The statistics of a row of logits; `chunked_ce.rows.statistics` has their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistic import EXP_IS_ZERO, Row, RowStatistics, Shards, Statistic

__all__ = ["AtIds", "Correct", "LogSum", "Maximum", "Mean", "Predicted", "Squares", "Target", "Total", "Weighted"]


class Maximum(Statistic):
    name, reads, differentiable = "maximum", "logits", False
    empty = (-math.inf,)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (values.amax(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return (part[0].amax(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return logits.detach().amax(-1)


class LogSum(Statistic):
    """Its part is the sum of exponentials."""

    name, reads = "log_sum", "exponentials"

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (values.sum(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return ((part[0] * shards.share).sum(0),)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        return sum_exp.log()

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return torch.logsumexp(shifted, -1)


class Target(Statistic):
    """Its part is -inf where the target is in another shard."""

    name, reads = "target", "relative"
    empty = (-math.inf,)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (values.gather(-1, not_none(row.target).unsqueeze(-1)).squeeze(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return ((part[0] + shards.shift).amax(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return shifted.gather(-1, not_none(row.target).unsqueeze(-1)).squeeze(-1)


class Weighted(Statistic):
    """Its part is the weighted sum of the logits, and the sum of the class weights."""

    name, reads, adds, in_gradient = "weighted", "relative", True, False
    empty = (0.0, 0.0)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        if isinstance(row.weight_sum, Tensor):
            return values @ not_none(row.class_weight), row.weight_sum.expand(len(values))
        return values.sum(-1), values.new_full(values.shape[:1], row.weight_sum)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        at_maxima, weight_sums = part
        return (at_maxima + weight_sums * shards.shift).sum(0), weight_sums.sum(0)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return (shifted if row.class_weight is None else shifted * row.class_weight).sum(-1)

    def added(self, slope: Tensor, class_weight: Tensor | None) -> Tensor:
        return slope if class_weight is None else slope * class_weight

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs() * largest_weight


class Mean(Statistic):
    """Its part is the sum of exp(z) * z."""

    name, reads, in_factor, keeps_relative, low_rank = "mean", "both", True, True, False

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (not_none(row.relative).mul_(values).sum(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        moved = shards.share * shards.shift.clamp(min=EXP_IS_ZERO) * shards.sum_exp
        return ((shards.share * part[0] + moved).sum(0),)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        return part[0] / sum_exp

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return (shifted.softmax(-1) * shifted).sum(-1)

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        return values.clamp_(min=EXP_IS_ZERO).add_((1 - not_none(rows.mean)).unsqueeze(-1)).mul_(slope)

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs() * (2 + rows.log_sum - not_none(rows.mean))  # |p log p| <= 1 / e


class Predicted(Statistic):
    """Its part is the index of the largest logit, the first one in a tie; fp32 holds those below 2**24."""

    name, reads, differentiable, in_gradient, in_triton = "predicted", "logits", False, False, False
    is_index = True

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (values.argmax(-1).to(values.dtype),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return (part[0].where(shards.is_largest, torch.inf).amin(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return logits.argmax(-1).to(logits.dtype)


class Correct(Predicted):
    name, in_triton = "correct", True

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        return (part[0] == target).to(sum_exp.dtype)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return (logits.argmax(-1) == not_none(row.target)).to(logits.dtype)


class Squares(Statistic):
    """Its part is the sum of the squared exponentials."""

    name, reads, in_factor, low_rank = "squares", "exponentials", True, False

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (torch.linalg.vecdot(values, values),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return ((part[0] * shards.share.square()).sum(0),)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        return part[0].log()

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return torch.logsumexp(2 * shifted, -1)

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        return values * (2 * slope * (rows.log_sum - not_none(rows.squares)).exp().unsqueeze(-1))

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return 2 * slope.abs()


class AtIds(Statistic):
    """Its part is -inf where an id is in another shard, or stands for none."""

    name, reads, low_rank, in_gradient, in_triton = "at_ids", "relative", False, False, False
    per_id = True
    empty = (-math.inf,)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        ids = not_none(row.ids)
        return (values.gather(-1, ids.clamp(min=0)).masked_fill_(ids < 0, -torch.inf),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return ((part[0] + shards.shift.unsqueeze(-1)).amax(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        ids = not_none(row.ids)
        return shifted.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs().sum(-1)


class Total(Statistic):
    """Its part is the sum of the logits."""

    name, reads, low_rank, adds, in_gradient = "total", "logits", False, True, False

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (values.sum(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return (part[0].sum(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return logits.sum(-1)

    def added(self, slope: Tensor, class_weight: Tensor | None) -> Tensor:
        return slope

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs()
