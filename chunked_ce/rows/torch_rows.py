"""Row kernels in torch: statistics of rows of logits, and the gradients of the logits.

Rows are visited a few at a time, so that the fp32 copy of a bf16 row, its exponentials and its gradient stay in
cache and each logit is read from and written to memory once. `chunked_ce.rows.statistics` is the slow twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import (
    EXP_IS_ZERO,
    STATISTICS,
    Logits,
    Row,
    RowStatistics,
    columns_of,
    empty_part,
    num_columns,
    statistics_of,
    weight_sum,
    work_dtype,
    zero_statistics,
)

__all__ = [
    "logit_gradients",
    "rows_in_flight",
    "scale_into",
    "shard_statistics",
    "statistics",
    "statistics_and_gradients_",
]

_CACHED_ELEMENTS = 2**19  # fp32 numbers in flight: about the second-level caches of two cores
_SCALED_ROWS = 4096  # rows of a gradient scaled at a time: little scratch, yet more than a cache holds
_DEVICE_ELEMENTS = 2**24  # on an accelerator a kernel must be worth its launch
_LOG_HALF = -0.6931
_WITH_FACTORS = tuple(name for name in STATISTICS if STATISTICS[name].keeps_relative)
_ADDED = tuple(name for name in STATISTICS if STATISTICS[name].adds)


def rows_in_flight(vocab_size: int, device_type: str) -> int:
    """How many rows are visited at a time."""
    elements = _CACHED_ELEMENTS if device_type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // max(1, vocab_size))


def statistics(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    names: tuple[str, ...],
    *,
    overwrite: bool,
) -> RowStatistics:
    """The statistics of each row; with ``overwrite``, the products serve as scratch."""
    part = shard_statistics(products, target, class_weight, logits, names, 0, overwrite=overwrite)
    return statistics_of(part, target, names)


def shard_statistics(
    products: Tensor,  # (n, V_r)
    target: Tensor,  # (n,) column of the target, -1 where it is in another shard
    class_weight: Tensor | None,  # (V_r,)
    logits: Logits,
    names: tuple[str, ...],
    start: int,  # index of the first column in the whole vocabulary
    *,
    overwrite: bool = False,
) -> Tensor:
    """This shard's part of the statistics of each row, (n, columns): see `chunked_ce.rows.statistics`.

    With ``overwrite``, the products serve as scratch.
    """
    dtype = work_dtype(products.dtype)
    if products.shape[1] == 0:
        return empty_part(len(products), names, dtype, products.device)
    parts = torch.empty(len(products), num_columns(names), dtype=dtype, device=products.device)
    places = columns_of(names)
    whole = Row(target.clamp(min=0), class_weight, weight_sum(class_weight, products.shape[1]))
    for rows, z in _visit(products, logits, overwrite):
        # Clamped so that a row whose entries are all masked, by a bias of -inf, has exponentials of 0, not NaN.
        part = _exponentiate_(z, whole._replace(target=whole.target[rows]), names, torch.finfo(dtype).min)
        torch.stack([values for name in names for values in part[name]], -1, out=parts[rows])
    columns = parts.unbind(-1)
    columns[places["target"].start].masked_fill_(target < 0, -torch.inf)
    if "correct" in places:
        columns[places["correct"].start].add_(start)
    return parts


def statistics_and_gradients_(
    products: Tensor,  # (n, V): the gradients when it returns
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    names: tuple[str, ...],
    slopes_of: Callable[[RowStatistics, slice], RowStatistics],
    slope_names: Iterable[str] = (),  # statistics besides log_sum and target for which it may return slopes
    columns: ColumnSums | None = None,
    apart: Tensor | None = None,  # (n,)
) -> RowStatistics:
    """The statistics of each row; the gradients, with slopes from ``slopes_of``, overwrite the products.

    With ``apart``, the gradients of the targets' logits are written there, unrounded, and the products get 0.
    """
    whole = zero_statistics(len(products), names, products.dtype, products.device)
    row = Row(target, class_weight, weight_sum(class_weight, products.shape[1]))
    keeps = _keeps_logits(logits, slope_names)
    for rows, z in _visit(products, logits, overwrite=True):
        kept = z.clone() if keeps else None
        column = target[rows]
        part = _exponentiate_(z, row._replace(target=column), names)
        (sum_exp,) = part["log_sum"]
        block = RowStatistics(**{name: STATISTICS[name].value(part[name], sum_exp, column) for name in names})
        for into, values in zip(whole, block, strict=True):
            if into is not None:
                into[rows] = values
        slopes = slopes_of(block, rows)
        gradients = _gradients_(z, sum_exp, column, class_weight, slopes, logits, kept, block, columns)
        if apart is not None:
            apart[rows] = _take_targets_(gradients, column)
        if products.dtype != gradients.dtype:
            products[rows] = gradients
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
) -> None:
    """Write the gradients of the products to ``out``, from known statistics.

    The target's probability comes from the statistics: recomputed products may differ from the first ones in the last
    bit, which is large compared with ``1 - p`` of a confident token. Where ignored tokens are kept, rows whose slopes
    are all 0 get gradients of 0, whatever their logits hold.
    """
    if products.shape[1] == 0:
        return
    overwrite = out is products
    dead = None  # (n,)
    if not devices.drops_ignored(products.device):
        dead = functools.reduce(torch.logical_and, [slope == 0 for slope in slopes if slope is not None])
    keeps = _keeps_logits(logits, slopes.named())
    for rows, z in _visit(products, logits, overwrite):
        block = known.at(rows)
        dead_rows = None if dead is None else dead[rows].unsqueeze(-1)
        kept = z.clone() if keeps else None
        z.sub_(block.maximum.unsqueeze(-1)).exp_()
        gradients = _gradients_(
            z, block.log_sum.exp(), target[rows], class_weight, slopes.at(rows), logits, kept, block, columns, dead_rows
        )
        if dead_rows is not None:
            gradients.masked_fill_(dead_rows, 0)
        if apart is not None:
            apart[rows] = _take_targets_(gradients, target[rows])
        if not overwrite or out.dtype != gradients.dtype:
            out[rows] = gradients


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
    for part, rows in zip(out.split(_SCALED_ROWS), source.split(_SCALED_ROWS), strict=True):
        part.copy_(torch.mul(rows, factor, out=scratch[: len(rows)]))
    return out


def _visit(
    products: Tensor,  # (n, V)
    logits: Logits,
    overwrite: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time and their logits in the work dtype, in the products' own memory if possible."""
    n, vocab_size = products.shape
    step = rows_in_flight(vocab_size, products.device.type)
    dtype = work_dtype(products.dtype)
    scratch = None
    if not overwrite or products.dtype != dtype:
        scratch = products.new_empty(min(step, n), vocab_size, dtype=dtype)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        z = products[rows] if scratch is None else scratch[: rows.stop - start].copy_(products[rows])
        if logits.softcap is not None:
            z.mul_(logits.scale).div_(logits.softcap).tanh_().mul_(logits.softcap)
        elif logits.scale != 1.0:
            z.mul_(logits.scale)
        yield rows, z


def _exponentiate_(
    z: Tensor,  # (r, V) logits; exp(z - maximum) when it returns
    row: Row,
    names: tuple[str, ...],
    least: float | None = None,
) -> dict[str, Sequence[Tensor]]:
    """The part (r,) of each statistic of a few rows; logits are taken relative to the maximum, at least ``least``."""
    part = {}
    for name in _reading("logits", names):
        part[name] = STATISTICS[name].part(z, row)
    (maximum,) = part["maximum"]
    z.sub_((maximum if least is None else maximum.clamp(min=least)).unsqueeze(-1))
    for name in _reading("relative", names):
        part[name] = STATISTICS[name].part(z, row)
    asked = _reading("exponentials", names)
    rows = dict.fromkeys(asked, row)
    for name in asked:
        if STATISTICS[name].keeps_relative:
            rows[name] = row._replace(relative=z.clamp(min=EXP_IS_ZERO))
    z.exp_()
    for name in asked:
        part[name] = STATISTICS[name].part(z, rows[name])
    return part


@functools.cache
def _reading(values: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics among ``names`` whose part reads ``values`` from the buffer."""
    return tuple(name for name in names if STATISTICS[name].reads == values)


def _gradients_(
    exponentials: Tensor,  # (r, V) exp(z - maximum); the gradients when it returns
    sum_exp: Tensor,  # (r,)
    target: Tensor,  # (r,) column, or -1 where the target is in another block
    class_weight: Tensor | None,  # (V,)
    slopes: RowStatistics,
    logits: Logits,
    z: Tensor | None,  # (r, V) the logits, where softcap or a slope needs them
    rows: RowStatistics,
    columns: ColumnSums | None,
    dead: Tensor | None = None,  # (r, 1)
) -> Tensor:
    """The formula of `chunked_ce.rows.statistics`, chained through the softcap. The slopes include the logit scale.

    With ``columns``, the term of label smoothing is left out.
    """
    factor = (slopes.log_sum / sum_exp).unsqueeze(-1)
    for name in _WITH_FACTORS:
        slope = getattr(slopes, name)
        if slope is not None:
            relative, share = z - rows.maximum.unsqueeze(-1), (slope / sum_exp).unsqueeze(-1)
            factor = STATISTICS[name].softmax_factor(share, relative, rows).add_(factor)
    gradients = exponentials.mul_(factor)
    if columns is not None:
        part = gradients if logits.softcap is None else gradients * _chain(z, logits)
        columns.add(part if dead is None else part.masked_fill(dead, 0), slopes.log_sum)
    column = target.clamp(min=0).unsqueeze(-1)
    at_target = _at_target(slopes, rows).unsqueeze(-1)
    gradients.scatter_(-1, column, at_target.where(target.unsqueeze(-1) >= 0, gradients.gather(-1, column)))
    if columns is None:
        for name in _ADDED:
            slope = getattr(slopes, name)
            if slope is not None:
                gradients.add_(STATISTICS[name].added(slope.unsqueeze(-1), class_weight))
    if logits.softcap is not None:
        gradients.mul_(_chain(z, logits))
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


def _at_target(slopes: RowStatistics, rows: RowStatistics) -> Tensor:
    """The gradients (r,) of the targets' logits, without the term of label smoothing."""
    factor, logprob = slopes.log_sum, rows.logprob
    for name in _WITH_FACTORS:
        slope = getattr(slopes, name)
        if slope is not None:
            relative = rows.target.unsqueeze(-1).clone()
            factor = factor + STATISTICS[name].softmax_factor(slope.unsqueeze(-1), relative, rows).squeeze(-1)
    # For a confident token, expm1(log p) is p - 1 without cancellation.
    confident = torch.expm1(logprob) * factor + (factor + slopes.target)
    return confident.where(logprob > _LOG_HALF, logprob.exp() * factor + slopes.target)


def _chain(z: Tensor, logits: Logits) -> Tensor:
    """The derivative of the softcap at the capped logits ``z``."""
    return 1 - (z / logits.softcap).square_()
