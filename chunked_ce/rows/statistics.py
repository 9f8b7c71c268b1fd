"""The statistics of a row of logits: the few numbers that a loss depends on, and how each one enters its gradient.

They are relative to the row's largest logit ``m``, so that a large common offset of the logits costs no precision:

    log_sum   = log sum_v exp(z_v - m)          lse = m + log_sum
    target    = z_y - m                         nll = log_sum - target
    weighted  = sum_v w_v (z_v - m)             sum_v w_v (lse - z_v) = sum_v w_v * log_sum - weighted
    mean      = sum_v p_v (z_v - m)             entropy = log_sum - mean
    correct   = 1 if z_y is the first of the largest logits, else 0
    squares   = log sum_v exp(2 (z_v - m))          log sum_v p_v^2 = squares - 2 log_sum
    at_ids    = z_id - m for each of K ids          -inf for an id that stands for none
    total     = sum_v z_v                           not relative: m + weighted / V would round as m does

A teacher's logits t, their maximum m' and probabilities p' add

    teacher_maximum, teacher_log_sum                m' and log sum_v exp(t_v - m')
    forward_kl = sum_v p'_v (log p'_v - log p_v)    KL(p' || p)
    reverse_kl = sum_v p_v (log p_v - log p'_v)     KL(p || p')
    mixture_kl, student_kl                          b KL(p' || m) + (1 - b) KL(p || m), and KL(p || m)

with the mixture m_v = b p'_v + (1 - b) p_v. The last two need both sums of exponentials over the whole vocabulary, and
thus a second pass over the row.

With the slopes (s_lse, s_target, ...) of the loss in these, the gradient of a logit is

    dz_v = p_v * (s_lse + s_mean * (1 + z_v - m - mean) + s_squares * 2 exp(z_v - m + log_sum - squares))
           + s_target * [v == y] + s_weighted * w_v + s_total + sum_k s_at_ids_k * [v == id_k]
           + s_forward_kl * (p_v - p'_v) + s_reverse_kl * p_v * (log p_v - log p'_v - reverse_kl)
           + s_mixture_kl * (1 - b) * p_v * (log p_v - log m_v - student_kl)

`STATISTICS` enumerates them. For each, a shard of the vocabulary sends a few numbers, its part: `merge_shards`
combines the parts of all shards, and `statistics_of` computes the statistics from the combined part.
`row_statistics` is the plain, differentiable reference; the row kernels beside this file are its fast twins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.rows.logits import Logits
from chunked_ce.rows.teacher import Pair, TeacherRows

__all__ = [
    "EXP_IS_ZERO",
    "NOTHING",
    "STATISTICS",
    "Logits",
    "PerRow",
    "RowStatistics",
    "Statistic",
    "along",
    "columns_of",
    "empty_part",
    "joined",
    "merge_shards",
    "names_of",
    "num_columns",
    "passes_of",
    "row_statistics",
    "statistics_of",
    "weight_sum",
    "work_dtype",
    "zero_statistics",
]

EXP_IS_ZERO = -1000.0  # its exp is 0 in fp32 and fp64, and 0 times it is 0, not NaN as for -inf


class PerRow(NamedTuple):
    """What a loss knows about each of n rows besides its logits and its target, None where not given."""

    temperature: Tensor | None = None  # (n,) which divides the logits
    ids: Tensor | None = None  # (n, K) columns, -1 for an id that is in no column
    teacher: TeacherRows | None = None

    def at(self, rows: slice) -> PerRow:
        *tensors, teacher = self
        tensors = [None if part is None else part[rows] for part in tensors]
        return PerRow(*tensors, None if teacher is None else teacher.at(rows))

    @property
    def num_ids(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]


NOTHING = PerRow()


class RowStatistics(NamedTuple):
    """Each statistic of n rows, (n,) or for ``at_ids`` (n, K), or None if it was not requested.

    Holds the statistics themselves, relative to ``maximum`` but for ``total``, or the slopes (derivatives) of a loss in
    them.
    """

    maximum: Tensor | None
    log_sum: Tensor
    target: Tensor
    weighted: Tensor | None = None
    mean: Tensor | None = None
    correct: Tensor | None = None
    squares: Tensor | None = None
    at_ids: Tensor | None = None
    total: Tensor | None = None
    teacher_maximum: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    mixture_kl: Tensor | None = None
    student_kl: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """Apply ``function`` to every statistic that is not None."""
        return RowStatistics(*[None if part is None else function(part) for part in self])

    def at(self, rows: slice) -> RowStatistics:
        return self.map(lambda part: part[rows])

    def scaled(self, factor: Tensor) -> RowStatistics:
        """Each statistic times the factor (n,) of its row."""
        return self.map(lambda part: part * along(factor, part))

    def named(self) -> dict[str, Tensor]:
        """The statistics that are not None, by name."""
        return {name: part for name, part in zip(self._fields, self, strict=True) if part is not None}

    @property
    def lse(self) -> Tensor:
        """log sum_v exp(z_v)."""
        return self.maximum + self.log_sum

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood of the target."""
        return self.log_sum - self.target

    @property
    def logprob(self) -> Tensor:
        """The log-probability of the target."""
        return self.target - self.log_sum

    @property
    def entropy(self) -> Tensor:
        """The entropy of the predicted distribution, in nats; it requires the statistic ``mean``."""
        return self.log_sum - self.mean

    @property
    def logprobs(self) -> Tensor:
        """The log-probabilities (n, K) of the ids, -inf for an id that stands for none; it requires ``at_ids``."""
        return self.at_ids - self.log_sum.unsqueeze(-1)


class Row(NamedTuple):
    """The inputs of a statistic's part, besides the logits of a few rows."""

    target: Tensor  # (r,) a column
    class_weight: Tensor | None  # (V,)
    weight_sum: Tensor | float  # sum of the class weights, V without them
    ids: Tensor | None = None  # (r, K) columns, -1 for an id that is in none
    relative: Tensor | None = None  # (r, V) z - m, a copy that may be overwritten, if its part reads ``"both"``
    pair: Pair | None = None  # of student and teacher
    teacher: Tensor | None = None  # (r, V) the teacher's logits, of `Statistic.reference`
    share: float = 0.0  # of the teacher in the mixture

    def at(self, rows: slice) -> Row:
        ids = None if self.ids is None else self.ids[rows]
        return self._replace(target=self.target[rows], ids=ids)


class Shards(NamedTuple):
    """The quantities that combine the parts of R shards, (R, n) each."""

    shift: Tensor  # each shard's maximum minus the maximum over all shards
    share: Tensor  # exp(shift)
    is_largest: Tensor
    sum_exp: Tensor  # relative to the shard's own maximum
    teacher: Shards | None = None  # the same of the teacher

    @classmethod
    def of(cls, maxima: Tensor, sum_exp: Tensor) -> Shards:
        # Clamped so that a shard without columns contributes 0, not NaN, also where no shard has a finite logit yet.
        lowest = torch.finfo(maxima.dtype).min
        maximum = maxima.amax(0)
        shift = (maxima - maximum.clamp(min=lowest)).clamp(min=lowest)
        return cls(shift, shift.exp(), maxima == maximum, sum_exp)


class Statistic:
    """One statistic of a row.

    ``reads`` says what the buffer of a few rows holds when `part` is called: ``"logits"`` z, ``"relative"`` z - m,
    ``"exponentials"`` exp(z - m), or ``"both"``: the exponentials, and z - m in ``Row.relative``. One that is
    ``of_teacher`` reads the teacher's logits or exponentials at the same time, in ``Row.pair``.
    """

    name: str
    reads: str
    differentiable = True
    in_factor = False  # whether its slope enters the factor of p_v, which then differs between the logits of a row
    keeps_relative = False  # whether that factor needs z - m
    low_rank = True  # whether a tail of low rank serves the gradients of its slope
    adds = False  # whether its slope adds one number, times the class weights, to the gradients of all logits
    in_gradient = True  # whether the gradient of the logits needs its value
    in_triton = True  # whether the Triton kernels compute it
    per_id = False  # whether it is (n, K), and its part too
    of_teacher = False  # whether it depends on a teacher
    reads_gap = False  # whether its part needs the gap between teacher and student
    keeps_gap = False  # whether the gradient of its slope needs it
    mixes = False  # whether its part needs the mixture of the two, and thus the sums of a first pass
    empty: tuple[float, ...] = (0.0,)  # the part of a shard without columns

    def part(self, values: Tensor, row: Row) -> Sequence[Tensor]:
        """The numbers that a shard sends, (r,) each, from the buffer ``values`` (r, V); with ``per_id``, (r, K)."""
        raise NotImplementedError

    def merge(self, part: Sequence[Tensor], shards: Shards) -> Sequence[Tensor]:
        """The combined part (n,) of R shards, from their parts (R, n)."""
        raise NotImplementedError

    def value(self, part: Sequence[Tensor], sum_exp: Tensor, target: Tensor) -> Tensor:
        """The statistic (n,) from the part of the whole vocabulary."""
        return part[0]

    def reference(self, logits: Tensor, shifted: Tensor, row: Row) -> Tensor:
        """The statistic (n,) in plain differentiable torch, from the logits (n, V) and z - m."""
        raise NotImplementedError

    def softmax_factor(self, slope: Tensor, values: Tensor, rows: RowStatistics) -> Tensor:
        """The term of its slope (r, 1) in the factor of p_v, if it is ``in_factor``.

        ``values`` (r, V) are z - m if it ``keeps_relative``, and may be overwritten; else exp(z - m). One that is
        ``of_teacher`` returns the term (r, 1) that all logits of a row share, and `beside` what each has of its own.
        """
        raise NotImplementedError

    def prepare(self, pair: Pair, exponentials: Tensor, sum_exp: Tensor, teacher_sum: Tensor) -> None:
        """Prepare ``pair`` for `beside`, if it ``keeps_gap``: exp(z - m) (r, V), and the sums of both (r,)."""
        raise NotImplementedError

    def beside(self, slope: Tensor, pair: Pair, sum_exp: Tensor, teacher_sum: Tensor) -> tuple[Tensor, Tensor]:
        """A factor (r,) and values (r, V), whose product its slope (r,) adds to the gradients of the logits.

        For one that is ``of_teacher``: ``pair`` holds the exponentials, the sums (r,) are theirs.
        """
        raise NotImplementedError

    def added(self, slope: Tensor, class_weight: Tensor | None) -> Tensor:
        """The term of its slope (r, 1) in the gradients of all logits, broadcast to (r, V), if it ``adds``."""
        raise NotImplementedError

    def bound(self, slope: Tensor, rows: RowStatistics, largest_weight: float | Tensor) -> Tensor | float:
        """A bound on the term of its slope (r,) in any logit's gradient; `LogSum` and `Target` are bounded jointly."""
        return 0.0


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


class Correct(Statistic):
    """Its part is the index of the largest logit, the first one in a tie."""

    name, reads, differentiable, in_gradient = "correct", "logits", False, False

    def part(self, values, row):
        return (values.argmax(-1).to(values.dtype),)

    def merge(self, part, shards):
        return (part[0].where(shards.is_largest, torch.inf).amin(0),)

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


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Maximum(),
        LogSum(),
        Target(),
        Weighted(),
        Mean(),
        Correct(),
        Squares(),
        AtIds(),
        Total(),
        TeacherMaximum(),
        TeacherLogSum(),
        ForwardKL(),
        ReverseKL(),
        MixtureKL(),
        StudentKL(),
    )
}
_ALWAYS = ("maximum", "log_sum", "target")
_ALWAYS_OF_TEACHER = ("teacher_maximum", "teacher_log_sum")


def names_of(asked: Iterable[str]) -> tuple[str, ...]:
    """The statistics that every loss needs and those in ``asked``, in the order of `STATISTICS`."""
    asked = {*_ALWAYS, *asked}
    if any(STATISTICS[name].of_teacher for name in asked):
        asked.update(_ALWAYS_OF_TEACHER)
    return tuple([name for name in STATISTICS if name in asked])


@functools.cache
def passes_of(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The statistics whose parts are computed in the first pass over a row, and those that need the first ones."""
    second = tuple([name for name in names if STATISTICS[name].mixes])
    return tuple([name for name in names if name not in second]), second


@functools.cache
def columns_of(names: tuple[str, ...], num_ids: int = 0) -> dict[str, slice]:
    """The columns of a part that belong to each statistic."""
    columns, start = {}, 0
    for name in names:
        statistic = STATISTICS[name]
        columns[name] = slice(start, start + len(statistic.empty) * (num_ids if statistic.per_id else 1))
        start = columns[name].stop
    return columns


def num_columns(names: tuple[str, ...], num_ids: int = 0) -> int:
    """How many numbers a shard sends for a row."""
    return columns_of(names, num_ids)[names[-1]].stop


def joined(parts: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
    """The columns (..., columns) of parts that are (...) or (..., K) each, by their number of dimensions."""
    parts = list(parts)
    dims = parts[0].dim()
    if all(part.dim() == dims for part in parts):
        return torch.stack(parts, -1, out=out)
    return torch.cat([part if part.dim() > dims else part.unsqueeze(-1) for part in parts], -1, out=out)


def empty_part(
    num_rows: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device, num_ids: int = 0
) -> Tensor:
    """The part (n, columns) of a shard without columns."""
    statistics = [STATISTICS[name] for name in names]
    values = [value for one in statistics for value in one.empty * (num_ids if one.per_id else 1)]
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True).repeat(num_rows, 1)


def merge_shards(parts: Tensor, names: tuple[str, ...]) -> Tensor:
    """The part (n, columns) of R shards taken together, from their parts (R, n, columns) of one pass."""
    columns = _split(parts, names)
    if "maximum" not in columns:  # of the second pass
        return parts.sum(0)
    shards = Shards.of(*columns["maximum"], *columns["log_sum"])
    if "teacher_log_sum" in columns:
        shards = shards._replace(teacher=Shards.of(*columns["teacher_maximum"], *columns["teacher_log_sum"]))
    return joined(merged for name in names for merged in STATISTICS[name].merge(columns[name], shards))


def statistics_of(
    part: Tensor,  # (n, columns) of the whole vocabulary, of the first pass
    target: Tensor,  # (n,)
    names: tuple[str, ...],
) -> RowStatistics:
    """The statistics of rows from their part; NaN where every vocabulary entry of a row is masked."""
    columns = _split(part, names)
    (maximum,), (sum_exp,) = columns["maximum"], columns["log_sum"]
    sum_exp = sum_exp.where(maximum != -torch.inf, torch.nan)
    return RowStatistics(**{name: STATISTICS[name].value(columns[name], sum_exp, target) for name in names})


def _split(part: Tensor, names: tuple[str, ...]) -> dict[str, tuple[Tensor, ...]]:
    """The columns (...) of each statistic in a part (..., columns); of one per id, a tensor (..., K)."""
    singles = num_columns(tuple([name for name in names if not STATISTICS[name].per_id]))
    num_ids = part.shape[-1] - singles
    return {
        name: (part[..., at],) if STATISTICS[name].per_id else part[..., at].unbind(-1)
        for name, at in columns_of(names, num_ids).items()
    }


def row_statistics(
    logits: Tensor,  # (n, V), fp32 or fp64, scaled and capped
    target: Tensor,  # (n,) in [0, V)
    class_weight: Tensor | None,  # (V,)
    names: tuple[str, ...],
    ids: Tensor | None = None,  # (n, K) in [0, V), or -1
    teacher: Tensor | None = None,  # (n, V) logits
    share: float = 0.0,  # of the teacher in the mixture
) -> RowStatistics:
    """The statistics of each row in plain differentiable torch: the reference of every kernel."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    row = Row(target, class_weight, weight_sum(class_weight, logits.shape[-1]), ids, teacher=teacher, share=share)
    return RowStatistics(**{name: STATISTICS[name].reference(logits, shifted, row) for name in names})


def weight_sum(class_weight: Tensor | None, vocab_size: int) -> Tensor | float:
    """The sum of the class weights (V,), which are all 1 if None."""
    return float(vocab_size) if class_weight is None else class_weight.sum()


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, loss and statistics for products in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_statistics(
    num_rows: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device, num_ids: int = 0
) -> RowStatistics:
    """Zeros, as ignored tokens have them, for each statistic in ``names``, for products in ``dtype``."""
    shapes = {name: (num_rows, num_ids) if STATISTICS[name].per_id else (num_rows,) for name in names}
    dtype = work_dtype(dtype)
    return RowStatistics(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})


def along(factor: Tensor, values: Tensor) -> Tensor:
    """A factor (n,) in the number of dimensions of ``values`` (n, ...)."""
    return factor if values.dim() <= 1 else factor.view(-1, *(1,) * (values.dim() - 1))
