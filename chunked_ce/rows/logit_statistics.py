"""The statistics of a row of logits; `chunked_ce.rows.statistics` has their formulas."""

from __future__ import annotations

import math

import torch

from chunked_ce.rows.statistic import EXP_IS_ZERO, Statistic

__all__ = ["AtIds", "Correct", "LogSum", "Maximum", "Mean", "Predicted", "Squares", "Target", "Total", "Weighted"]


class Maximum(Statistic):
    name, reads, differentiable = "maximum", "logits", False
    empty = (-math.inf,)

    def part(self, values, row):
        return (values.amax(-1),)

    def merge(self, part, shards):
        return (part[0].amax(0),)

    def reference(self, logits, shifted, row):
        return logits.detach().amax(-1)


class LogSum(Statistic):
    """Its part is the sum of exponentials."""

    name, reads = "log_sum", "exponentials"

    def part(self, values, row):
        return (values.sum(-1),)

    def merge(self, part, shards):
        return ((part[0] * shards.share).sum(0),)

    def value(self, part, sum_exp, target):
        return sum_exp.log()

    def reference(self, logits, shifted, row):
        return torch.logsumexp(shifted, -1)


class Target(Statistic):
    """Its part is -inf where the target is in another shard."""

    name, reads = "target", "relative"
    empty = (-math.inf,)

    def part(self, values, row):
        return (values.gather(-1, row.target.unsqueeze(-1)).squeeze(-1),)

    def merge(self, part, shards):
        return ((part[0] + shards.shift).amax(0),)

    def reference(self, logits, shifted, row):
        return shifted.gather(-1, row.target.unsqueeze(-1)).squeeze(-1)


class Weighted(Statistic):
    """Its part is the weighted sum of the logits, and the sum of the class weights."""

    name, reads, adds, in_gradient = "weighted", "relative", True, False
    empty = (0.0, 0.0)

    def part(self, values, row):
        if row.class_weight is None:
            return values.sum(-1), values.new_full(values.shape[:1], row.weight_sum)
        return values @ row.class_weight, row.weight_sum.expand(len(values))

    def merge(self, part, shards):
        at_maxima, weight_sums = part
        return (at_maxima + weight_sums * shards.shift).sum(0), weight_sums.sum(0)

    def reference(self, logits, shifted, row):
        return (shifted if row.class_weight is None else shifted * row.class_weight).sum(-1)

    def added(self, slope, class_weight):
        return slope if class_weight is None else slope * class_weight

    def bound(self, slope, rows, largest_weight):
        return slope.abs() * largest_weight


class Mean(Statistic):
    """Its part is the sum of exp(z) * z."""

    name, reads, in_factor, keeps_relative, low_rank = "mean", "both", True, True, False

    def part(self, values, row):
        return (row.relative.mul_(values).sum(-1),)

    def merge(self, part, shards):
        moved = shards.share * shards.shift.clamp(min=EXP_IS_ZERO) * shards.sum_exp
        return ((shards.share * part[0] + moved).sum(0),)

    def value(self, part, sum_exp, target):
        return part[0] / sum_exp

    def reference(self, logits, shifted, row):
        return (shifted.softmax(-1) * shifted).sum(-1)

    def softmax_factor(self, slope, values, rows):
        return values.clamp_(min=EXP_IS_ZERO).add_((1 - rows.mean).unsqueeze(-1)).mul_(slope)

    def bound(self, slope, rows, largest_weight):
        return slope.abs() * (2 + rows.log_sum - rows.mean)  # |p log p| <= 1 / e


class Predicted(Statistic):
    """Its part is the index of the largest logit, the first one in a tie; fp32 holds those below 2**24."""

    name, reads, differentiable, in_gradient, in_triton = "predicted", "logits", False, False, False
    is_index = True

    def part(self, values, row):
        return (values.argmax(-1).to(values.dtype),)

    def merge(self, part, shards):
        return (part[0].where(shards.is_largest, torch.inf).amin(0),)

    def reference(self, logits, shifted, row):
        return logits.argmax(-1).to(logits.dtype)


class Correct(Predicted):
    name, in_triton = "correct", True

    def value(self, part, sum_exp, target):
        return (part[0] == target).to(sum_exp.dtype)

    def reference(self, logits, shifted, row):
        return (logits.argmax(-1) == row.target).to(logits.dtype)


class Squares(Statistic):
    """Its part is the sum of the squared exponentials."""

    name, reads, in_factor, low_rank = "squares", "exponentials", True, False

    def part(self, values, row):
        return (torch.linalg.vecdot(values, values),)

    def merge(self, part, shards):
        return ((part[0] * shards.share.square()).sum(0),)

    def value(self, part, sum_exp, target):
        return part[0].log()

    def reference(self, logits, shifted, row):
        return torch.logsumexp(2 * shifted, -1)

    def softmax_factor(self, slope, values, rows):
        return values * (2 * slope * (rows.log_sum - rows.squares).exp().unsqueeze(-1))

    def bound(self, slope, rows, largest_weight):
        return 2 * slope.abs()


class AtIds(Statistic):
    """Its part is -inf where an id is in another shard, or stands for none."""

    name, reads, low_rank, in_gradient, in_triton = "at_ids", "relative", False, False, False
    per_id = True
    empty = (-math.inf,)

    def part(self, values, row):
        return (values.gather(-1, row.ids.clamp(min=0)).masked_fill_(row.ids < 0, -torch.inf),)

    def merge(self, part, shards):
        return ((part[0] + shards.shift.unsqueeze(-1)).amax(0),)

    def reference(self, logits, shifted, row):
        return shifted.gather(-1, row.ids.clamp(min=0)).masked_fill(row.ids < 0, -torch.inf)

    def bound(self, slope, rows, largest_weight):
        return slope.abs().sum(-1)


class Total(Statistic):
    """Its part is the sum of the logits."""

    name, reads, low_rank, adds, in_gradient = "total", "logits", False, True, False

    def part(self, values, row):
        return (values.sum(-1),)

    def merge(self, part, shards):
        return (part[0].sum(0),)

    def reference(self, logits, shifted, row):
        return logits.sum(-1)

    def added(self, slope, class_weight):
        return slope

    def bound(self, slope, rows, largest_weight):
        return slope.abs()
