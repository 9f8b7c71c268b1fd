"""What a statistic of a row of logits is, and the tuples in which statistics and what they depend on travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.sizes import work_dtype
from chunked_ce.rows.teacher import Pair, TeacherRows

__all__ = [
    "EXP_IS_ZERO",
    "NOTHING",
    "PerRow",
    "Row",
    "RowStatistics",
    "Shards",
    "Statistic",
    "along",
    "at_target",
    "weight_sum",
    "work_dtype",
]

_LOG_HALF = -0.6931
EXP_IS_ZERO = -1000.0  # its exp is 0 in fp32 and fp64, and 0 times it is 0, not NaN as for -inf


class PerRow(NamedTuple):
    """What a loss knows about each of n rows besides its logits and its target, None where not given."""

    temperature: Tensor | None = None  # (n,) which divides the logits
    ids: Tensor | None = None  # (n, K) columns, -1 for an id that is in no column
    teacher: TeacherRows | None = None
    counted: Tensor | None = None  # (n,) False for ignored tokens, where these are kept: their gradients are 0

    def at(self, rows: slice) -> PerRow:
        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        teacher = None if self.teacher is None else self.teacher.at(rows)
        return PerRow(of(self.temperature), of(self.ids), teacher, of(self.counted))

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
    predicted: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """Apply ``function`` to every statistic that is not None."""
        parts: list[Any] = [None if part is None else function(part) for part in self]
        return RowStatistics(*parts)

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
        return not_none(self.maximum) + self.log_sum

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
        return self.log_sum - not_none(self.mean)

    @property
    def logprobs(self) -> Tensor:
        """The log-probabilities (n, K) of the ids, -inf for an id that stands for none; it requires ``at_ids``."""
        return not_none(self.at_ids) - self.log_sum.unsqueeze(-1)


class Row(NamedTuple):
    """The inputs of a statistic's part, besides the logits of a few rows."""

    target: Tensor | None  # (r,) a column; None in a second pass
    class_weight: Tensor | None  # (V,)
    weight_sum: Tensor | float  # sum of the class weights, V without them
    ids: Tensor | None = None  # (r, K) columns, -1 for an id that is in none
    relative: Tensor | None = None  # (r, V) z - m, a copy that may be overwritten, if its part reads ``"both"``
    pair: Pair | None = None  # of student and teacher
    teacher: Tensor | None = None  # (r, V) the teacher's logits, of `Statistic.reference`
    share: float = 0.0  # of the teacher in the mixture

    def at(self, rows: slice) -> Row:
        ids = None if self.ids is None else self.ids[rows]
        return self._replace(target=not_none(self.target)[rows], ids=ids)


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
    is_index = False  # whether its part is a column, which counts from the first one of the whole vocabulary
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


def weight_sum(class_weight: Tensor | None, vocab_size: int) -> Tensor | float:
    """The sum of the class weights (V,), which are all 1 if None."""
    return float(vocab_size) if class_weight is None else class_weight.sum()


def along(factor: Tensor, values: Tensor) -> Tensor:
    """A factor (n,) in the number of dimensions of ``values`` (n, ...)."""
    return factor if values.dim() <= 1 else factor.view(-1, *(1,) * (values.dim() - 1))


def at_target(logprob: Tensor, factor: Tensor, slope: Tensor) -> Tensor:
    """The gradients (n,) of the targets' logits, p * ``factor`` + ``slope``: for a confident token, expm1(log p) is
    p - 1 without cancellation."""
    confident = torch.expm1(logprob) * factor + (factor + slope)
    return confident.where(logprob > _LOG_HALF, logprob.exp() * factor + slope)
