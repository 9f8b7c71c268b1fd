"""The statistics of a row of logits beside a teacher's; `chunked_ce.rows.statistics` has their formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chunked_ce.rows.statistic import Row, Statistic

__all__ = ["ForwardKL", "MixtureKL", "ReverseKL", "StudentKL", "TeacherLogSum", "TeacherMaximum"]


class TeacherMaximum(Statistic):
    name, reads, differentiable, of_teacher, in_triton = "teacher_maximum", "logits", False, True, False
    empty = (-math.inf,)

    def part(self, values, row):
        return (row.pair.t.amax(-1),)

    def merge(self, part, shards):
        return (part[0].amax(0),)

    def reference(self, logits, shifted, row):
        return row.teacher.amax(-1)


class TeacherLogSum(Statistic):
    """Its part is the sum of the teacher's exponentials."""

    name, reads, differentiable, of_teacher, in_triton = "teacher_log_sum", "exponentials", False, True, False

    def part(self, values, row):
        return (row.pair.sum_exp,)

    def merge(self, part, shards):
        return ((part[0] * shards.teacher.share).sum(0),)

    def value(self, part, sum_exp, target):
        return part[0].log()

    def reference(self, logits, shifted, row):
        return torch.logsumexp(row.teacher, -1) - row.teacher.amax(-1)


class ForwardKL(Statistic):
    """Its part is the sum of exp(t - m') times the gap, and the sum of these exponentials.

    Its slope enters the factor of p_v, and the gradient of every logit with -p'_v.
    """

    name, reads, in_factor, low_rank, in_gradient, in_triton = "forward_kl", "exponentials", True, False, False, False
    of_teacher = reads_gap = True
    empty = (0.0, 0.0)

    def part(self, values, row):
        return row.pair.sum_gaps_of_teacher(), row.pair.sum_exp

    def merge(self, part, shards):
        gaps, sums = part
        moved = gaps + (shards.teacher.shift - shards.shift) * sums
        share = shards.teacher.share
        return (share * moved).where(share > 0, 0).sum(0), (share * sums).sum(0)

    def value(self, part, sum_exp, target):
        gaps, sums = part
        return gaps / sums + (sum_exp / sums).log()

    def reference(self, logits, shifted, row):
        p = row.teacher.softmax(-1)
        terms = row.teacher.log_softmax(-1).where(p > 0, 0) - logits.log_softmax(-1)
        return (p * terms.where(p > 0, 0)).sum(-1)

    def softmax_factor(self, slope, values, rows):
        return slope

    def beside(self, slope, pair, sum_exp, teacher_sum):
        return -slope / teacher_sum, pair.t

    def bound(self, slope, rows, largest_weight):
        return slope.abs()


class ReverseKL(Statistic):
    """Its part is minus the sum of exp(z - m) times the gap, and the sum of the teacher's exponentials."""

    name, reads, in_factor, low_rank, in_triton = "reverse_kl", "exponentials", True, False, False
    of_teacher = reads_gap = keeps_gap = True
    empty = (0.0, 0.0)

    def part(self, values, row):
        return -row.pair.sum_gaps_of_student(values), row.pair.sum_exp

    def merge(self, part, shards):
        gaps, sums = part
        moved = gaps + (shards.shift - shards.teacher.shift) * shards.sum_exp
        share = shards.share
        return (share * moved).where(share > 0, 0).sum(0), (shards.teacher.share * sums).sum(0)

    def value(self, part, sum_exp, target):
        gaps, sums = part
        return gaps / sum_exp + (sums / sum_exp).log()

    def reference(self, logits, shifted, row):
        logprobs = logits.log_softmax(-1)
        p = logprobs.exp()
        terms = logprobs.where(p > 0, 0) - row.teacher.log_softmax(-1)
        return (p * terms.where(p > 0, 0)).sum(-1)

    def softmax_factor(self, slope, values, rows):
        offset = rows.reverse_kl + rows.log_sum - rows.teacher_log_sum
        return -slope * offset.unsqueeze(-1)

    def prepare(self, pair, exponentials, sum_exp, teacher_sum):
        pair.sum_gaps_of_student(exponentials)

    def beside(self, slope, pair, sum_exp, teacher_sum):
        return -slope / sum_exp, pair.weighted_gap

    def bound(self, slope, rows, largest_weight):
        # |p log(p / p')| is at most the divergence plus 1 / e: all other terms of its sum are at least -1 / e together.
        return slope.abs() * (1 + 2 * rows.reverse_kl)


class MixtureKL(Statistic):
    """Its slope counts for the student's share of it: the row kernels multiply it by 1 - b."""

    name, reads, in_factor, low_rank, in_gradient, in_triton = "mixture_kl", "mixture", True, False, False, False
    of_teacher = reads_gap = keeps_gap = mixes = True

    def part(self, values, row):
        pair = row.pair
        return (pair.share * pair.kl_of_teacher + (1 - pair.share) * pair.kl_of_student,)

    def reference(self, logits, shifted, row):
        of_teacher, of_student = _kl_to_mixture(row.teacher, logits, row), _kl_to_mixture(logits, logits, row)
        return row.share * of_teacher + (1 - row.share) * of_student

    def softmax_factor(self, slope, values, rows):
        return -slope * rows.student_kl.unsqueeze(-1)

    def prepare(self, pair, exponentials, sum_exp, teacher_sum):
        pair.mix_(exponentials, sum_exp, teacher_sum)

    def beside(self, slope, pair, sum_exp, teacher_sum):
        return -slope / sum_exp, pair.weighted_ratio

    def bound(self, slope, rows, largest_weight):
        return slope.abs() * (1 + 2 * rows.student_kl)


class StudentKL(Statistic):
    name, reads, differentiable, low_rank, in_triton = "student_kl", "mixture", False, False, False
    of_teacher = mixes = True

    def part(self, values, row):
        return (row.pair.kl_of_student,)

    def reference(self, logits, shifted, row):
        return _kl_to_mixture(logits, logits, row).detach()


def _kl_to_mixture(of: Tensor, logits: Tensor, row: Row) -> Tensor:
    """The divergence (n,) of the distribution with logits ``of`` (n, V) from the mixture, in plain torch."""
    parts = row.teacher.log_softmax(-1) + math.log(row.share), logits.log_softmax(-1) + math.log1p(-row.share)
    logprobs = of.log_softmax(-1)
    p = logprobs.exp()
    return (p * (logprobs - torch.logaddexp(*parts)).where(p > 0, 0)).sum(-1)
