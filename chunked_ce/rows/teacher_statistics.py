"""The statistics of a row of logits beside a teacher's; `chunked_ce.rows.statistics` has their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistic import Row, RowStatistics, Shards, Statistic
from chunked_ce.rows.teacher import Pair

__all__ = ["ForwardKL", "MixtureKL", "ReverseKL", "StudentKL", "TeacherLogSum", "TeacherMaximum"]


class TeacherMaximum(Statistic):
    name, reads, differentiable, of_teacher, in_triton = "teacher_maximum", "logits", False, True, False
    empty = (-math.inf,)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (not_none(row.pair).t.amax(-1),)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return (part[0].amax(0),)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return not_none(row.teacher).amax(-1)


class TeacherLogSum(Statistic):
    """Its part is the sum of the teacher's exponentials."""

    name, reads, differentiable, of_teacher, in_triton = "teacher_log_sum", "exponentials", False, True, False

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (not_none(row.pair).sum_exp,)

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        return ((part[0] * not_none(shards.teacher).share).sum(0),)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        return part[0].log()

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        teacher = not_none(row.teacher)
        return torch.logsumexp(teacher, -1) - teacher.amax(-1)


class ForwardKL(Statistic):
    """Its part is the sum of exp(t - m') times the gap, and the sum of these exponentials.

    Its slope enters the factor of p_v, and the gradient of every logit with -p'_v.
    """

    name, reads, in_factor, low_rank, in_gradient, in_triton = "forward_kl", "exponentials", True, False, False, False
    of_teacher = reads_gap = True
    empty = (0.0, 0.0)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        pair = not_none(row.pair)
        return pair.sum_gaps_of_teacher(), pair.sum_exp

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        (gaps, sums), teacher = part, not_none(shards.teacher)
        moved = gaps + (teacher.shift - shards.shift) * sums
        share = teacher.share
        return (share * moved).where(share > 0, 0).sum(0), (share * sums).sum(0)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        gaps, sums = part
        return gaps / sums + (sum_exp / sums).log()

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        teacher = not_none(row.teacher)
        p = teacher.softmax(-1)
        terms = teacher.log_softmax(-1).where(p > 0, 0) - logits.log_softmax(-1)
        return (p * terms.where(p > 0, 0)).sum(-1)

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        return slope

    def beside(self, slope: Tensor, pair: Pair, sum_exp: Tensor, teacher_sum: Tensor) -> tuple[Tensor, Tensor]:
        return -slope / teacher_sum, pair.t

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs()


class ReverseKL(Statistic):
    """Its part is minus the sum of exp(z - m) times the gap, and the sum of the teacher's exponentials."""

    name, reads, in_factor, low_rank, in_triton = "reverse_kl", "exponentials", True, False, False
    of_teacher = reads_gap = keeps_gap = True
    empty = (0.0, 0.0)

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        pair = not_none(row.pair)
        return -pair.sum_gaps_of_student(values), pair.sum_exp

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        (gaps, sums), teacher = part, not_none(shards.teacher)
        moved = gaps + (shards.shift - teacher.shift) * shards.sum_exp
        share = shards.share
        return (share * moved).where(share > 0, 0).sum(0), (teacher.share * sums).sum(0)

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        gaps, sums = part
        return gaps / sum_exp + (sums / sum_exp).log()

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        logprobs = logits.log_softmax(-1)
        p = logprobs.exp()
        terms = logprobs.where(p > 0, 0) - not_none(row.teacher).log_softmax(-1)
        return (p * terms.where(p > 0, 0)).sum(-1)

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        offset = not_none(rows.reverse_kl) + rows.log_sum - not_none(rows.teacher_log_sum)
        return -slope * offset.unsqueeze(-1)

    def prepare(self, pair: Pair, exponentials: Tensor, sum_exp: Tensor, teacher_sum: Tensor) -> None:
        pair.sum_gaps_of_student(exponentials)

    def beside(self, slope: Tensor, pair: Pair, sum_exp: Tensor, teacher_sum: Tensor) -> tuple[Tensor, Tensor]:
        return -slope / sum_exp, pair.weighted_gap

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        # |p log(p / p')| is at most the divergence plus 1 / e: all other terms of its sum are at least -1 / e together.
        return slope.abs() * (1 + 2 * not_none(rows.reverse_kl))


class MixtureKL(Statistic):
    """Its slope counts for the student's share of it: the row kernels multiply it by 1 - b."""

    name, reads, in_factor, low_rank, in_gradient, in_triton = "mixture_kl", "mixture", True, False, False, False
    of_teacher = reads_gap = keeps_gap = mixes = True

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        pair = not_none(row.pair)
        return (pair.share * pair.kl_of_teacher + (1 - pair.share) * pair.kl_of_student,)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        of_teacher, of_student = _kl_to_mixture(not_none(row.teacher), logits, row), _kl_to_mixture(logits, logits, row)
        return row.share * of_teacher + (1 - row.share) * of_student

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        return -slope * not_none(rows.student_kl).unsqueeze(-1)

    def prepare(self, pair: Pair, exponentials: Tensor, sum_exp: Tensor, teacher_sum: Tensor) -> None:
        pair.mix_(exponentials, sum_exp, teacher_sum)

    def beside(self, slope: Tensor, pair: Pair, sum_exp: Tensor, teacher_sum: Tensor) -> tuple[Tensor, Tensor]:
        return -slope / sum_exp, pair.weighted_ratio

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        return slope.abs() * (1 + 2 * not_none(rows.student_kl))


class StudentKL(Statistic):
    name, reads, differentiable, low_rank, in_triton = "student_kl", "mixture", False, False, False
    of_teacher = mixes = True

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        return (not_none(row.pair).kl_of_student,)

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        return _kl_to_mixture(logits, logits, row).detach()


def _kl_to_mixture(of: Tensor, logits: Tensor, row: Row) -> Tensor:
    """The divergence (n,) of the distribution with logits ``of`` (n, V) from the mixture, in plain torch."""
    of_teacher, of_student = not_none(row.teacher).log_softmax(-1), logits.log_softmax(-1)
    parts = of_teacher + math.log(row.share), of_student + math.log1p(-row.share)
    logprobs = of.log_softmax(-1)
    p = logprobs.exp()
    return (p * (logprobs - torch.logaddexp(*parts)).where(p > 0, 0)).sum(-1)
