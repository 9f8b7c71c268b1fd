"""The rows of a teacher beside those of its student, a few at a time.

With the logits z and t of student and teacher, their maxima m and m', and probabilities p and p', the divergences are
sums of p or p' times a function of the gap (t_v - m') - (z_v - m). It is formed for each vocabulary entry before it is
summed, so that a student close to its teacher loses nothing to cancellation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.rows.logits import Logits

__all__ = ["Pair", "Pairs", "TeacherRows"]

_LARGEST_GAP = 1e30
_LARGEST_RATIO = {torch.float32: 80.0, torch.float64: 600.0}  # of log p'/p: its exp is finite, and 1 is nothing beside


class TeacherRows(NamedTuple):
    """The teacher's side of n tokens and B vocabulary entries of its student; nothing is copied before it is read."""

    products: Tensor  # (M, B') before scale and softcap, or probabilities
    logits: Logits
    index: Tensor | None = None  # (n,) the row of each token, None for rows in order
    columns: Tensor | None = None  # (B,) the column of each entry, None for columns in order
    counted: Tensor | None = None  # (n,) False for tokens whose row counts as zeros
    are_probabilities: bool = False
    overwrite: bool = False  # whether the products may serve as scratch
    share: float = 0.0  # of the teacher in the mixture of the two distributions

    def at(self, rows: slice) -> TeacherRows:
        counted = None if self.counted is None else self.counted[rows]
        if self.index is not None:
            return self._replace(index=self.index[rows], counted=counted)
        return self._replace(products=self.products[rows], counted=counted)

    def values(self) -> Tensor:
        """The products (n, B), a view of them where possible."""
        values = self.products if self.index is None else self.products.index_select(0, self.index)
        values = values if self.columns is None else values.index_select(1, self.columns)
        return values if self.counted is None else values.where(self.counted.unsqueeze(-1), 0)

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
    """A few rows of teacher and student: ``t`` and the gap are overwritten in the order of the methods."""

    def __init__(self, t: Tensor, gap: Tensor | None, mixed: Tensor | None, share: float) -> None:
        self.t = t  # (r, B) the teacher's logits, then t - m', then exp(t - m')
        self.gap = gap  # (r, B) (t - m') - (z - m), where one is needed
        self.share = share
        self._mixed = mixed  # (r, B) where `mix_` is needed
        self._is_finite = False  # whether the gap is known to be finite

    def relate_(self, z: Tensor, maximum: Tensor) -> None:
        """Take ``maximum`` (r,) off the teacher's logits, and relate them to the student's ``z`` (r, B), z - m."""
        self.t.sub_(maximum.unsqueeze(-1))
        if self.gap is not None:
            torch.sub(self.t, z, out=self.gap)

    def exponentiate_(self) -> None:
        self.t.exp_()

    @functools.cached_property
    def sum_exp(self) -> Tensor:
        """(r,) of the teacher."""
        return self.t.sum(-1)

    def mean_gap(self, weights: Tensor) -> Tensor:
        """sum_v w_v * gap_v (r,) for ``weights`` (r, B), where a weight of 0 makes 0 of any gap."""
        total = torch.linalg.vecdot(self.gap, weights)
        if total.device.type == "cpu" and total.isfinite().all():
            self._is_finite = True
            return total
        return torch.linalg.vecdot(self.gap.masked_fill(weights == 0, 0), weights)

    def mix_(self, exponentials: Tensor, sum_exp: Tensor, teacher_sum: Tensor) -> None:
        """Compare both distributions with their mixture, m_v = share * p'_v + (1 - share) * p_v.

        ``exponentials`` (r, B) are exp(z - m), the sums (r,) those of both over the whole vocabulary. Sets ``student``,
        log(p_v / m_v) (r, B), in the memory of the gap, and for these entries the sums ``kl_of_teacher`` and
        ``kl_of_student`` (r,) of p'_v log(p'_v / m_v) and p_v log(p_v / m_v). The logarithm of a mixture is taken
        relative to its larger part, and by log1p and expm1, since the two distributions may hardly differ.
        """
        limit = _LARGEST_RATIO[self.gap.dtype]
        ratio = self.gap.add_((sum_exp / teacher_sum).log().unsqueeze(-1))  # log(p'_v / p_v)
        ratio.nan_to_num_(0.0, limit, -limit).clamp_(-limit, limit)
        if self.share <= 0.5:
            to_mixture = torch.expm1(ratio, out=self._mixed).mul_(self.share).log1p_()  # log(m_v / p_v)
            teacher, self.student = ratio.sub_(to_mixture), to_mixture.neg_()
        else:
            to_mixture = torch.neg(ratio, out=self._mixed).expm1_().mul_(1 - self.share).log1p_()  # log(m_v / p'_v)
            self.student = ratio.add_(to_mixture).neg_()
            teacher = to_mixture.neg_()
        self.kl_of_teacher = torch.linalg.vecdot(self.t, teacher) / teacher_sum
        self.kl_of_student = torch.linalg.vecdot(exponentials, self.student) / sum_exp

    def finite_gap(self) -> Tensor:
        """The gap, which may be overwritten; where student or teacher exclude an entry, a number times which 0 is 0."""
        if not self._is_finite:
            self.gap.nan_to_num_(0.0, _LARGEST_GAP, -_LARGEST_GAP)
            self._is_finite = True
        return self.gap


class Pairs:
    """Room for the pairs of a few rows at a time."""

    def __init__(
        self,
        teacher: TeacherRows,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        gap: bool,
        mixed: bool,
        overwrite: bool,
    ) -> None:
        in_order = teacher.index is None and teacher.columns is None and teacher.counted is None
        in_place = overwrite and teacher.overwrite and in_order and teacher.products.dtype == dtype
        self._teacher = teacher
        self._t = None if in_place else teacher.products.new_empty(shape, dtype=dtype)
        self._gap = teacher.products.new_empty(shape, dtype=dtype) if gap or mixed else None
        self._mixed = teacher.products.new_empty(shape, dtype=dtype) if mixed else None

    def at(self, rows: slice, temperature: Tensor | None) -> Pair:
        """The pair of ``rows``, with their ``temperature`` (r,): valid until the next one."""
        size = rows.stop - rows.start
        t = self._teacher.at(rows).read(temperature, None if self._t is None else self._t[:size])
        gap, mixed = (None if part is None else part[:size] for part in (self._gap, self._mixed))
        return Pair(t, gap, mixed, self._teacher.share)
