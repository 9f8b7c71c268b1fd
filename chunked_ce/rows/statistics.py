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
    predicted = the first v with the largest z_v

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
from collections.abc import Iterable

import torch
from torch import Tensor

from chunked_ce.rows import logit_statistics as of_logits
from chunked_ce.rows import teacher_statistics as of_teacher
from chunked_ce.rows.logits import Logits
from chunked_ce.rows.statistic import (
    EXP_IS_ZERO,
    NOTHING,
    PerRow,
    Row,
    RowStatistics,
    Shards,
    Statistic,
    along,
    at_target,
    weight_sum,
    work_dtype,
)

__all__ = [
    "EXP_IS_ZERO",
    "NOTHING",
    "STATISTICS",
    "Logits",
    "PerRow",
    "Row",
    "RowStatistics",
    "Statistic",
    "along",
    "at_target",
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

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        of_logits.Maximum(),
        of_logits.LogSum(),
        of_logits.Target(),
        of_logits.Weighted(),
        of_logits.Mean(),
        of_logits.Correct(),
        of_logits.Squares(),
        of_logits.AtIds(),
        of_logits.Total(),
        of_teacher.TeacherMaximum(),
        of_teacher.TeacherLogSum(),
        of_teacher.ForwardKL(),
        of_teacher.ReverseKL(),
        of_teacher.MixtureKL(),
        of_teacher.StudentKL(),
        of_logits.Predicted(),
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
    end: int = columns_of(names, num_ids)[names[-1]].stop
    return end


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


def zero_statistics(
    num_rows: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device, num_ids: int = 0
) -> RowStatistics:
    """Zeros, as ignored tokens have them, for each statistic in ``names``, for products in ``dtype``."""
    shapes = {name: (num_rows, num_ids) if STATISTICS[name].per_id else (num_rows,) for name in names}
    dtype = work_dtype(dtype)
    return RowStatistics(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})
