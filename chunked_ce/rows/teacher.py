"""The rows of a teacher beside those of its student, a few at a time.

With the logits z and t of student and teacher, their maxima m and m', and probabilities p and p', the divergences are
sums of p or p' times a function of the gap (t_v - m') - (z_v - m). It is formed for each vocabulary entry before it is
summed, so that a student close to its teacher loses nothing to cancellation.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.exponential import exp_
from chunked_ce.rows.logits import Logits

__all__ = ["Pair", "Pairs", "TeacherRows"]

_LARGEST_RATIO = {torch.float32: 80.0, torch.float64: 600.0}  # of log p'/p: its exp is finite, and 1 is nothing beside


class TeacherRows(NamedTuple):
    """The teacher's side of n tokens and B vocabulary entries of its student; nothing is copied before it is read."""

    products: Tensor  # (M, B') before scale and softcap, or probabilities
    logits: Logits
    row_index: Tensor | None = None  # (n,) the row of each token, None for rows in order
    columns: Tensor | None = None  # (B,) the column of each entry, None for columns in order
    counted: Tensor | None = None  # (n,) False for tokens whose row counts as uniform
    are_probabilities: bool = False
    overwrite: bool = False  # whether the products may serve as scratch
    share: float = 0.0  # of the teacher in the mixture of the two distributions

    def at(self, rows: slice) -> TeacherRows:
        counted = None if self.counted is None else self.counted[rows]
        if self.row_index is not None:
            return self._replace(row_index=self.row_index[rows], counted=counted)
        return self._replace(products=self.products[rows], counted=counted)

    def values(self) -> Tensor:
        """The products (n, B), a view of them where possible."""
        values = self.products if self.row_index is None else self.products.index_select(0, self.row_index)
        values = values if self.columns is None else values.index_select(1, self.columns)
        uniform = 1.0 if self.are_probabilities else 0.0
        return values if self.counted is None else values.where(self.counted.unsqueeze(-1), uniform)

    def read(self, temperature: Tensor | None, out: Tensor | None) -> Tensor:
        """The logits (n, B), in ``out`` or in the products' own memory."""
        values = self.values()
        z = values if out is None else out.copy_(values)
        return self.logits.apply_(z.log_() if self.are_probabilities else z, temperature)

    def plain_logits(self, temperature: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The logits (n, B) in plain torch, with nothing overwritten."""
        values = self.values().to(dtype)
        return self.logits(values.log() if self.are_probabilities else values, temperature)


class Pair:
    """A few rows of teacher and student. The methods overwrite ``t`` and the gap, and are called in their order."""

    def __init__(self, t: Tensor, room: Pairs, share: float) -> None:
        self.t = t  # (r, B) the teacher's logits, then t - m', then exp(t - m')
        self.share = share
        gap, mixed = room.gap, room.mixed
        self._gap = None if gap is None else gap[: len(t)]  # (r, B) (t - m') - (z - m), where one is needed
        self._mixed = None if mixed is None else mixed[: len(t)]  # (r, B) where `mix_` is called
        self._uses = room.gaps  # of the gap that are left
        self._is_narrow = room.is_narrow

    def relate_(self, z: Tensor, maximum: Tensor) -> None:
        """Take ``maximum`` (r,) off the teacher's logits, and relate them to the student's ``z`` (r, B), z - m."""
        self.t.sub_(maximum.unsqueeze(-1))
        if self._gap is not None:
            torch.sub(self.t, z, out=self._gap)

    def exponentiate_(self) -> None:
        exp_(self.t)

    @functools.cached_property
    def sum_exp(self) -> Tensor:
        """The sum of the teacher's exponentials (r,)."""
        return self.t.sum(-1)

    def sum_gaps_of_teacher(self) -> Tensor:
        """sum_v exp(t_v - m') * gap_v, (r,)."""
        return _weighted_(self._take_gap(), self.t)[1]

    def sum_gaps_of_student(self, exponentials: Tensor) -> Tensor:
        """sum_v exp(z_v - m) * gap_v, (r,), whose terms (r, B) are then ``weighted_gap``."""
        self.weighted_gap, total = _weighted_(self._take_gap(), exponentials)
        return total

    def mix_(self, exponentials: Tensor, sum_exp: Tensor, teacher_sum: Tensor) -> None:
        """Compare both distributions with their mixture, m_v = share * p'_v + (1 - share) * p_v.

        ``exponentials`` (r, B) are exp(z - m), the sums (r,) those of both over the whole vocabulary. Sets
        ``kl_of_teacher`` and ``kl_of_student`` (r,), the sums of p'_v log(p'_v / m_v) and p_v log(p_v / m_v) over these
        entries, and ``weighted_ratio`` (r, B), exp(z_v - m) log(m_v / p_v). The logarithm of the mixture is taken
        relative to its larger part, and by log1p, since the two distributions may hardly differ.
        """
        limit, quotient = _LARGEST_RATIO[exponentials.dtype], (sum_exp / teacher_sum).unsqueeze(-1)
        ratio = self._take_gap().add_(quotient.log()).clamp_(-limit, limit)  # log(p'_v / p_v)
        if self.share <= 0.5:
            smaller = self._expm1(ratio, self.t, exponentials, quotient).mul_(self.share)
            student = smaller.log1p_()  # log(m_v / p_v)
            teacher = torch.sub(student, ratio, out=ratio)  # log(m_v / p'_v)
        else:
            ratio.neg_()
            smaller = self._expm1(ratio, exponentials, self.t, 1 / quotient).mul_(1 - self.share)
            teacher = smaller.log1p_()
            student = torch.sub(teacher, ratio, out=ratio)
        self.weighted_ratio, total = _weighted_(student, exponentials)
        self.kl_of_student = -total / sum_exp
        self.kl_of_teacher = -_weighted_(teacher, self.t)[1] / teacher_sum

    def _expm1(self, ratio: Tensor, over: Tensor, under: Tensor, quotient: Tensor) -> Tensor:
        """expm1 of a ratio's logarithm (r, B), in the memory for mixtures.

        It is also ``over / under * quotient - 1``, which is much faster. Its error is a rounding of 1, which is small
        beside the ratio of narrow logits. In this order it is NaN where both are 0, and nowhere else: their products
        with a quotient may be 0 before they are.
        """
        if not self._is_narrow:
            return torch.expm1(ratio, out=self._mixed)
        largest = math.exp(_LARGEST_RATIO[ratio.dtype])
        return torch.div(over, under, out=self._mixed).mul_(quotient).sub_(1).clamp_(max=largest)

    def _take_gap(self) -> Tensor:
        """The gap to overwrite, which the last use need not copy."""
        self._uses -= 1
        gap = not_none(self._gap)
        return gap.clone() if self._uses else gap


def _weighted_(
    values: Tensor,  # (r, B), of any size where the weight is 0
    weights: Tensor,  # (r, B)
) -> tuple[Tensor, Tensor]:
    """The products of values and weights (r, B), in the memory of the values, and their sum (r,)."""
    products = values.mul_(weights)
    total = products.sum(-1)
    if total.device.type == "cpu" and math.isfinite(total.sum()):
        return products, total
    products.masked_fill_(weights == 0, 0)
    return products, products.sum(-1)


class Pairs:
    """Room for the pairs of a few rows at a time."""

    def __init__(
        self,
        teacher: TeacherRows,
        shape: tuple[int, int],  # (r, B)
        dtype: torch.dtype,  # of the student's products
        *,
        gaps: int,  # uses of the gap
        mixes: bool,
        overwrite: bool,
    ) -> None:
        work = torch.promote_types(dtype, torch.float32)
        self.is_narrow = work != dtype
        in_order = teacher.row_index is None and teacher.columns is None and teacher.counted is None
        in_place = overwrite and teacher.overwrite and in_order and teacher.products.dtype == work
        self._teacher, self.gaps = teacher, gaps
        self._t = None if in_place else teacher.products.new_empty(shape, dtype=work)
        self.gap = teacher.products.new_empty(shape, dtype=work) if gaps else None
        self.mixed = teacher.products.new_empty(shape, dtype=work) if mixes else None

    def at(self, rows: slice, temperature: Tensor | None) -> Pair:
        """The pair of ``rows``, with their ``temperature`` (r,): valid until the next one."""
        size = rows.stop - rows.start
        t = self._teacher.at(rows).read(temperature, None if self._t is None else self._t[:size])
        return Pair(t, self, self._teacher.share)
