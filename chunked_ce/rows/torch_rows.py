"""Row kernels in torch: statistics of rows of logits, and the gradients of the logits.

Rows are visited a few at a time, so that the fp32 copy of a bf16 row, its exponentials and its gradient stay in
cache and each logit is read from and written to memory once. Several threads take turns in it.
`chunked_ce.rows.statistics` is the slow twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.exponential import exp_
from chunked_ce.rows.sizes import rows_in_flight, rows_of_visit
from chunked_ce.rows.statistics import (
    EXP_IS_ZERO,
    NOTHING,
    STATISTICS,
    Logits,
    PerRow,
    Row,
    RowStatistics,
    at_target,
    columns_of,
    empty_part,
    joined,
    num_columns,
    passes_of,
    statistics_of,
    weight_sum,
    work_dtype,
    zero_statistics,
)
from chunked_ce.rows.teacher import Pair, Pairs
from chunked_ce.rows.visits import Visit, visit_rows

__all__ = [
    "logit_gradients",
    "rows_in_flight",
    "scale_into",
    "second_statistics",
    "shard_statistics",
    "statistics",
    "statistics_and_gradients_",
]

_SCALED_ROWS = 4096  # rows of a gradient scaled at a time: little scratch, yet more than a cache holds
_IN_FACTOR = tuple(name for name in STATISTICS if STATISTICS[name].in_factor)
_ADDED = tuple(name for name in STATISTICS if STATISTICS[name].adds)
_OF_TEACHER = tuple(name for name in STATISTICS if STATISTICS[name].of_teacher and STATISTICS[name].in_factor)


def statistics(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    names: tuple[str, ...],
    *,
    overwrite: bool,
    per_row: PerRow = NOTHING,
) -> RowStatistics:
    """The statistics of each row; with ``overwrite``, the products serve as scratch."""
    first, second = passes_of(names)
    arguments = products, target, class_weight, logits, first, 0
    part = shard_statistics(*arguments, overwrite=overwrite and not second, per_row=per_row)
    rows = statistics_of(part, target, first)
    if not second:
        return rows
    part = second_statistics(products, logits, second, rows, overwrite=overwrite, per_row=per_row)
    return rows._replace(**dict(zip(second, part.unbind(-1), strict=True)))


def shard_statistics(
    products: Tensor,  # (n, V_r)
    target: Tensor,  # (n,) column of the target, -1 where it is in another shard
    class_weight: Tensor | None,  # (V_r,)
    logits: Logits,
    names: tuple[str, ...],
    start: int,  # index of the first column in the whole vocabulary
    *,
    overwrite: bool = False,
    per_row: PerRow = NOTHING,
) -> Tensor:
    """This shard's part of the statistics of each row, (n, columns): see `chunked_ce.rows.statistics`.

    With ``overwrite``, the products serve as scratch.
    """
    dtype, num_ids = work_dtype(products.dtype), per_row.num_ids
    if products.shape[1] == 0:
        return empty_part(len(products), names, dtype, products.device, num_ids)
    places = columns_of(names, num_ids)
    parts = torch.empty(len(products), num_columns(names, num_ids), dtype=dtype, device=products.device)
    whole = Row(target.clamp(min=0), class_weight, weight_sum(class_weight, products.shape[1]), per_row.ids)

    def visit(visited: Visit) -> None:
        rows, z, pair, _ = visited
        # Clamped so that a row whose entries are all masked, by a bias of -inf, has exponentials of 0, not NaN.
        part = _exponentiate_(z, whole.at(rows)._replace(pair=pair), names, torch.finfo(dtype).min)
        joined((values for name in names for values in part[name]), out=parts[rows])

    pairs = functools.partial(_pairs, products, per_row, names, overwrite=overwrite)
    visit_rows(visit, products, logits, per_row, pairs, overwrite=overwrite)
    columns = parts.unbind(-1)
    columns[places["target"].start].masked_fill_(target < 0, -torch.inf)
    for name in names:
        if STATISTICS[name].is_index:
            columns[places[name].start].add_(start)
    return parts


def second_statistics(
    products: Tensor,  # (n, V_r)
    logits: Logits,
    names: tuple[str, ...],  # of the second pass
    known: RowStatistics,  # of the first pass, over the whole vocabulary
    *,
    overwrite: bool = False,
    per_row: PerRow = NOTHING,
) -> Tensor:
    """This shard's part of the statistics that need those of a first pass, (n, columns); `overwrite` as before."""
    dtype = work_dtype(products.dtype)
    parts = torch.zeros(len(products), num_columns(names), dtype=dtype, device=products.device)
    if products.shape[1] == 0:
        return parts

    def visit(visited: Visit) -> None:
        rows, z, pair = visited.rows, visited.z, not_none(visited.pair)
        block = known.at(rows)
        z.sub_(not_none(block.maximum).unsqueeze(-1))
        pair.relate_(z, not_none(block.teacher_maximum))
        pair.exponentiate_()
        exp_(z)
        pair.mix_(z, block.log_sum.exp(), not_none(block.teacher_log_sum).exp())
        row = Row(None, None, 0.0, pair=pair)
        joined((values for name in names for values in STATISTICS[name].part(z, row)), out=parts[rows])

    pairs = functools.partial(_pairs, products, per_row, names, overwrite=overwrite)
    visit_rows(visit, products, logits, per_row, pairs, overwrite=overwrite)
    return parts


def statistics_and_gradients_(
    products: Tensor,  # (n, V), overwritten
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    names: tuple[str, ...],
    slopes_of: Callable[[RowStatistics, slice], RowStatistics],
    slope_names: Iterable[str] = (),  # statistics besides log_sum and target for which it may return slopes
    out: Tensor | None = None,  # as products, None for products itself
    columns: ColumnSums | None = None,
    apart: Tensor | None = None,  # (n,)
    *,
    per_row: PerRow = NOTHING,
) -> RowStatistics:
    """The statistics of each row; the gradients, with slopes from ``slopes_of``, are written to ``out``.

    With ``apart``, the gradients of the targets' logits are written there, unrounded, and ``out`` gets 0.
    """
    out = products if out is None else out
    whole = zero_statistics(len(products), names, products.dtype, products.device, per_row.num_ids)
    every = Row(target, class_weight, weight_sum(class_weight, products.shape[1]), per_row.ids)
    keeps = _keeps_logits(logits, slope_names)
    first, second = passes_of(names)

    def visit(visited: Visit) -> None:
        rows, z, pair, sums = visited
        kept = z.clone() if keeps else None
        row, column = every.at(rows)._replace(pair=pair), target[rows]
        part = _exponentiate_(z, row, first)
        (sum_exp,) = part["log_sum"]
        block = RowStatistics(**{name: STATISTICS[name].value(part[name], sum_exp, column) for name in first})
        if second:
            not_none(pair).mix_(z, sum_exp, not_none(pair).sum_exp)
            block = block._replace(**{name: STATISTICS[name].part(z, row)[0] for name in second})
        for into, values in zip(whole, block, strict=True):
            if into is not None:
                into[rows] = not_none(values)
        slopes = slopes_of(block, rows)
        few = Few(sum_exp, column, class_weight, slopes, kept, block, per_row.at(rows), pair)
        if pair is not None:
            few = few._replace(teacher_sum=pair.sum_exp)
        gradients = _gradients_(z, few, logits, sums)
        if apart is not None:
            apart[rows] = _take_targets_(gradients, column)
        if out is not products or out.dtype != gradients.dtype:
            out[rows] = gradients

    pairs = functools.partial(_pairs, products, per_row, names, overwrite=True)
    visit_rows(visit, products, logits, per_row, pairs, overwrite=True, columns=columns)
    return whole


def logit_gradients(
    products: Tensor,  # (n, V), or (n, B) for a block of the vocabulary
    target: Tensor,  # (n,) column of the target, -1 where it is in no column
    class_weight: Tensor | None,  # (V,) or (B,)
    logits: Logits,
    slopes: RowStatistics,
    known: RowStatistics,  # over the whole vocabulary
    out: Tensor,  # as products; may be products itself
    columns: ColumnSums | None = None,
    apart: Tensor | None = None,  # (n,) as in `statistics_and_gradients_`
    *,
    per_row: PerRow = NOTHING,
) -> None:
    """Write the gradients of the products to ``out``, from known statistics.

    The target's probability comes from the statistics: recomputed products may differ from the first ones in the last
    bit, which is large compared with ``1 - p`` of a confident token. Rows that ``per_row`` does not count get gradients
    of 0, whatever their logits hold.
    """
    if products.shape[1] == 0:
        return
    overwrite = out is products
    dead = None if per_row.counted is None else per_row.counted.logical_not()  # (n,)
    keeps = _keeps_logits(logits, slopes.named())
    slope_names = slopes.named()
    asked = [name for name in slope_names if STATISTICS[name].keeps_gap]

    def visit(visited: Visit) -> None:
        rows, z, pair, sums = visited
        block = known.at(rows)
        dead_rows = None if dead is None else dead[rows].unsqueeze(-1)
        kept = z.clone() if keeps else None
        z.sub_(not_none(block.maximum).unsqueeze(-1))
        if pair is not None:
            pair.relate_(z, not_none(block.teacher_maximum))
            pair.exponentiate_()
        exp_(z)
        few = Few(block.log_sum.exp(), target[rows], class_weight, slopes.at(rows), kept, block, per_row.at(rows), pair)
        if pair is not None:
            few = few._replace(teacher_sum=not_none(block.teacher_log_sum).exp())
        for name in asked:
            STATISTICS[name].prepare(not_none(pair), z, few.sum_exp, not_none(few.teacher_sum))
        gradients = _gradients_(z, few, logits, sums, dead_rows)
        if dead_rows is not None:
            gradients.masked_fill_(dead_rows, 0)
        if apart is not None:
            apart[rows] = _take_targets_(gradients, target[rows])
        if not overwrite or out.dtype != gradients.dtype:
            out[rows] = gradients

    pairs = functools.partial(_pairs, products, per_row, asked, overwrite=True)
    visit_rows(visit, products, logits, per_row, pairs, overwrite=overwrite, columns=columns)


def scale_into(
    source: Tensor,  # contiguous
    factor: Tensor,  # ()
    out: Tensor,  # as source, contiguous; may be source itself
) -> Tensor:
    """Write ``factor * source`` to ``out``; in place on a CPU, a factor of 1 costs nothing."""
    if out is source:
        unchanged = source.device.type == "cpu" and bool(factor == 1)
        return source if unchanged else source.mul_(factor)
    scratch = torch.empty_like(source[:_SCALED_ROWS])
    for part, rows in zip(torch.split(out, _SCALED_ROWS), torch.split(source, _SCALED_ROWS), strict=True):
        part.copy_(torch.mul(rows, factor, out=scratch[: len(rows)]))
    return out


def _exponentiate_(
    z: Tensor,  # (r, V) logits; exp(z - maximum) when it returns
    row: Row,
    names: tuple[str, ...],
    least: float | None = None,
) -> dict[str, Sequence[Tensor]]:
    """The part (r,) of each statistic of a few rows; logits are taken relative to the maximum, at least ``least``."""
    part: dict[str, Sequence[Tensor]] = {}
    for name in _reading("logits", names):
        part[name] = STATISTICS[name].part(z, row)
    (maximum,) = part["maximum"]
    z.sub_((maximum if least is None else maximum.clamp(min=least)).unsqueeze(-1))
    if row.pair is not None:
        (maximum,) = part["teacher_maximum"]
        row.pair.relate_(z, maximum if least is None else maximum.clamp(min=least))
        row.pair.exponentiate_()
    for name in _reading("relative", names):
        part[name] = STATISTICS[name].part(z, row)
    with_both = {name: row._replace(relative=z.clamp(min=EXP_IS_ZERO)) for name in _reading("both", names)}
    exp_(z)
    for name in _reading("exponentials", names):
        part[name] = STATISTICS[name].part(z, row)
    for name, both in with_both.items():
        part[name] = STATISTICS[name].part(z, both)
    return part


@functools.cache
def _reading(values: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics among ``names`` whose part reads ``values`` from the buffer."""
    return tuple(name for name in names if STATISTICS[name].reads == values)


class Few(NamedTuple):
    """What the gradients of a few rows depend on, besides their exponentials."""

    sum_exp: Tensor  # (r,)
    target: Tensor  # (r,) column, or -1 where the target is in another block
    class_weight: Tensor | None  # (V,)
    slopes: RowStatistics  # with the logit scale, and over the temperature
    z: Tensor | None  # (r, V) the logits, where softcap or a slope needs them
    rows: RowStatistics
    per_row: PerRow
    pair: Pair | None  # exponentials of the teacher, and the gap
    teacher_sum: Tensor | None = None  # (r,) of the teacher's exponentials over the whole vocabulary


def _pairs(
    products: Tensor,  # (n, V)
    per_row: PerRow,
    names: Iterable[str],  # of statistics to compute
    *,
    overwrite: bool,
) -> Callable[[slice], Pair | None]:
    """Gives the pair of each few rows that a thread visits, None without a teacher."""
    if per_row.teacher is None:
        return lambda rows: None
    gaps = sum(STATISTICS[name].reads_gap for name in names)
    mixes = any(STATISTICS[name].mixes for name in names)
    n, vocab_size = products.shape
    shape = min(n, rows_of_visit(vocab_size, products.device.type)), vocab_size
    pairs = Pairs(per_row.teacher, shape, products.dtype, gaps=gaps, mixes=mixes, overwrite=overwrite)
    return lambda rows: pairs.at(rows, None if per_row.temperature is None else per_row.temperature[rows])


def _gradients_(
    exponentials: Tensor,  # (r, V) exp(z - maximum); the gradients when it returns
    few: Few,
    logits: Logits,
    columns: ColumnSums | None,
    dead: Tensor | None = None,  # (r, 1)
) -> Tensor:
    """The formula of `chunked_ce.rows.statistics`, chained through the softcap.

    With ``columns``, the term of label smoothing is left out.
    """
    slopes, rows, target = few.slopes, few.rows, few.target
    factor, column = (slopes.log_sum / few.sum_exp).unsqueeze(-1), target.clamp(min=0).unsqueeze(-1)
    for name in _IN_FACTOR:
        slope = _slope(few, name)
        if slope is not None:
            values = exponentials
            if STATISTICS[name].keeps_relative:
                values = not_none(few.z) - not_none(rows.maximum).unsqueeze(-1)
            share = (slope / few.sum_exp).unsqueeze(-1)
            term = STATISTICS[name].softmax_factor(share, values, rows)
            factor = term.add_(factor) if term.shape[1] >= factor.shape[1] else factor.add_(term)
    gradients = exponentials.mul_(factor)
    if columns is not None:
        part = gradients if logits.softcap is None else gradients * _chain(few, logits)
        columns.add(part if dead is None else part.masked_fill(dead, 0), slopes.log_sum)
    of_target = _at_target(few).unsqueeze(-1)
    gradients.scatter_(-1, column, of_target.where(target.unsqueeze(-1) >= 0, gradients.gather(-1, column)))
    for name in _OF_TEACHER:
        slope = _slope(few, name)
        if slope is not None:
            factor, values = STATISTICS[name].beside(slope, not_none(few.pair), few.sum_exp, not_none(few.teacher_sum))
            gradients.addcmul_(values, factor.unsqueeze(-1))
    if slopes.at_ids is not None:
        ids = not_none(few.per_row.ids)
        gradients.scatter_add_(-1, ids.clamp(min=0), slopes.at_ids.where(ids >= 0, 0))
    if columns is None:
        for name in _ADDED:
            slope = getattr(slopes, name)
            if slope is not None:
                gradients.add_(STATISTICS[name].added(slope.unsqueeze(-1), few.class_weight))
    if logits.softcap is not None:
        gradients.mul_(_chain(few, logits))
    return gradients


def _keeps_logits(logits: Logits, slope_names: Iterable[str]) -> bool:
    """Whether the gradients need the logits as well as their exponentials."""
    return logits.softcap is not None or any(STATISTICS[name].keeps_relative for name in slope_names)


def _take_targets_(
    gradients: Tensor,  # (r, V), 0 at the targets when it returns
    target: Tensor,  # (r,) column, or -1 where the target is in another block
) -> Tensor:
    """Take out the gradients (r,) of the targets' logits, 0 where there is none."""
    column, is_local = target.clamp(min=0).unsqueeze(-1), target.unsqueeze(-1) >= 0
    taken = gradients.gather(-1, column)
    gradients.scatter_(-1, column, taken.masked_fill(is_local, 0))
    return taken.where(is_local, 0).squeeze(-1)


def _slope(few: Few, name: str) -> Tensor | None:
    """The slope (r,) in a statistic; of the divergence from a mixture, the student's share of it."""
    slope: Tensor | None = getattr(few.slopes, name)
    return slope * (1 - not_none(few.pair).share) if slope is not None and STATISTICS[name].mixes else slope


def _at_target(few: Few) -> Tensor:
    """The gradients (r,) of the targets' logits, without what is added to those of all logits."""
    slopes, rows = few.slopes, few.rows
    factor, logprob = slopes.log_sum, rows.logprob
    for name in _IN_FACTOR:
        slope = _slope(few, name)
        if slope is not None:
            values = rows.target.unsqueeze(-1).clone()
            values = values if STATISTICS[name].keeps_relative else values.exp_()
            factor = factor + STATISTICS[name].softmax_factor(slope.unsqueeze(-1), values, rows).squeeze(-1)
    return at_target(logprob, factor, slopes.target)


def _chain(few: Few, logits: Logits) -> Tensor:
    """The derivative of the softcap at the capped logits, which the temperature has divided."""
    capped = not_none(few.z) / not_none(logits.softcap)
    if few.per_row.temperature is not None:
        capped *= few.per_row.temperature.unsqueeze(-1)
    return 1 - capped.square_()
