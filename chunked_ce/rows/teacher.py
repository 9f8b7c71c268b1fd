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

    def __init__(self, t: Tensor, gap: Tensor | None, share: float) -> None:
        self.t = t  # (r, B) the teacher's logits, then t - m', then exp(t - m')
        self.gap = gap  # (r, B) (t - m') - (z - m), where one is needed
        self.share = share
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

    def finite_gap(self) -> Tensor:
        """The gap, which may be overwritten; where student or teacher exclude an entry, a number times which 0 is 0."""
        return self.gap if self._is_finite else self.gap.nan_to_num_(0.0, _LARGEST_GAP, -_LARGEST_GAP)


class Pairs:
    """Room for the pairs of a few rows at a time."""

    def __init__(
        self, teacher: TeacherRows, shape: tuple[int, int], dtype: torch.dtype, *, gap: bool, overwrite: bool
    ) -> None:
        in_order = teacher.index is None and teacher.columns is None and teacher.counted is None
        in_place = overwrite and teacher.overwrite and in_order and teacher.products.dtype == dtype
        self._teacher = teacher
        self._t = None if in_place else teacher.products.new_empty(shape, dtype=dtype)
        self._gap = teacher.products.new_empty(shape, dtype=dtype) if gap else None

    def at(self, rows: slice, temperature: Tensor | None) -> Pair:
        """The pair of ``rows``, with their ``temperature`` (r,): valid until the next one."""
        size = rows.stop - rows.start
        t = self._teacher.at(rows).read(temperature, None if self._t is None else self._t[:size])
        return Pair(t, None if self._gap is None else self._gap[:size], self._teacher.share)
