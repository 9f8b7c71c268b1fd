"""Row kernels in torch: statistics of rows of logits, and the gradients of the logits.

Rows are visited a few at a time, so that the fp32 copy of a bf16 row, its exponentials and its gradient stay in
cache and each logit is read from and written to memory once. `chunked_ce.objective` is the slow twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine import counted
from chunked_ce.engine.columns import ColumnSums
from chunked_ce.objective import Logits, RowStatistics

__all__ = [
    "Slopes",
    "Wanted",
    "empty_statistics",
    "logit_gradients",
    "rows_in_flight",
    "scale_into",
    "shard_statistics",
    "statistics",
    "statistics_and_gradients_",
    "work_dtype",
]

_CACHED_ELEMENTS = 2**19  # fp32 numbers in flight: about the second-level caches of two cores
# How much of a gradient is scaled at a time: small beside the gradient, large beside a cache.
_SCALED_ROWS = 4096
_DEVICE_ELEMENTS = 2**24  # on an accelerator a kernel must be worth its launch
_LOG_HALF = -0.6931
_EXP_IS_ZERO = -1000.0  # exp of it is 0 in fp32 and fp64, and 0 times it is 0, unlike 0 times -inf


class Slopes(NamedTuple):
    """Derivatives of the loss in each row's statistics, (n,); None is 0 for all rows."""

    log_sum: Tensor
    target: Tensor
    weighted: Tensor | None = None
    mean: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Slopes:
        """``function`` of every slope there is."""
        return Slopes(*(None if part is None else function(part) for part in self))

    def at(self, rows: slice) -> Slopes:
        return self.map(lambda part: part[rows])


class Wanted(NamedTuple):
    """Which statistics to compute besides ``maximum``, ``log_sum`` and ``target``."""

    weighted: bool = False
    mean: bool = False
    correct: bool = False


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, loss and statistics for products in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_statistics(num_tokens: int, dtype: torch.dtype, device: torch.device, wanted: Wanted) -> RowStatistics:
    """Zeros (num_tokens,) for every statistic wanted: what ignored tokens have."""
    needed = (True, True, True, *wanted)
    return RowStatistics(
        *(torch.zeros(num_tokens, dtype=work_dtype(dtype), device=device) if need else None for need in needed)
    )


def rows_in_flight(vocab_size: int, device_type: str) -> int:
    """How many rows are visited at a time."""
    elements = _CACHED_ELEMENTS if device_type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // max(1, vocab_size))


def statistics(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    wanted: Wanted,
    *,
    overwrite: bool,
) -> RowStatistics:
    """The statistics of each row; with ``overwrite`` the products are scratch afterwards."""
    found = empty_statistics(len(products), products.dtype, products.device, wanted)
    for rows, z in _visit(products, logits, overwrite):
        _store(found, rows, _exponentiate_(z, target[rows], class_weight, wanted)[0])
    return found


def shard_statistics(
    products: Tensor,  # (n, V_r)
    target: Tensor,  # (n,) column of the target, of any column where it is in another shard
    here: Tensor,  # (n,) whether the target is in this shard
    class_weight: Tensor | None,  # (V_r,)
    logits: Logits,
    wanted: Wanted,
    start: int,  # index of the first column in the whole vocabulary
    *,
    overwrite: bool = False,
) -> Tensor:
    """This shard's part of the statistics of each row, (n, columns): see `chunked_ce.objective.merge_shards`.

    With ``overwrite`` the products are scratch afterwards.
    """
    dtype = work_dtype(products.dtype)
    n, vocab_size = products.shape
    parts = torch.zeros(n, 3 + 2 * wanted.weighted + wanted.mean + wanted.correct, dtype=dtype, device=products.device)
    if vocab_size == 0:
        parts[:, 0] = parts[:, 2] = -torch.inf
        return parts
    weight_sum = float(vocab_size) if class_weight is None else class_weight.sum()
    for rows, z in _visit(products, logits, overwrite):
        part = iter(parts[rows].unbind(-1))
        best = z.argmax(-1) if wanted.correct else None
        found, sum_exp = _exponentiate_(z, target[rows], class_weight, wanted._replace(correct=False))
        next(part).copy_(found.maximum)
        next(part).copy_(sum_exp)
        next(part).copy_(found.target.where(here[rows], -torch.inf))
        if wanted.weighted:
            next(part).copy_(found.weighted)
            next(part).fill_(weight_sum)
        if wanted.mean:
            next(part).copy_(found.mean * sum_exp)
        if best is not None:
            next(part).copy_(best + start)
    masked = parts[:, 0] == -torch.inf  # every word of the row, by a bias
    neutral = {1: 0.0, 2: -torch.inf} | ({3: -torch.inf} if wanted.weighted else {})
    neutral |= {3 + 2 * wanted.weighted: 0.0} if wanted.mean else {}
    for column, value in neutral.items():
        parts[:, column].masked_fill_(masked, value)
    return parts


def statistics_and_gradients_(
    products: Tensor,  # (n, V): the gradients when it returns
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    wanted: Wanted,
    slopes_of: Callable[[RowStatistics, slice], Slopes],
    columns: ColumnSums | None = None,
    apart: Tensor | None = None,  # (n,)
) -> RowStatistics:
    """The statistics of each row, and the gradients that ``slopes_of`` makes of them written over the products.

    With ``apart`` those of the targets go there instead, without being rounded, and are 0 among the others.
    """
    found = empty_statistics(len(products), products.dtype, products.device, wanted)
    for rows, z in _visit(products, logits, overwrite=True):
        kept = z.clone() if logits.softcap is not None else None
        block, sum_exp = _exponentiate_(z, target[rows], class_weight, wanted)
        _store(found, rows, block)
        slopes = slopes_of(block, rows)
        gradients = _gradients_(z, sum_exp, target[rows], class_weight, slopes, logits, kept, block, columns)
        if apart is not None:
            apart[rows] = _take_targets_(gradients, target[rows])
        if products.dtype != gradients.dtype:
            products[rows] = gradients
    return found


def logit_gradients(
    products: Tensor,  # (n, V), or (n, B) for a block of the vocabulary
    target: Tensor,  # (n,) column of the target, -1 where it is none of these
    class_weight: Tensor | None,  # (V,) or (B,)
    logits: Logits,
    slopes: Slopes,
    known: RowStatistics,  # over the whole vocabulary
    out: Tensor,  # as products; may be products itself
    columns: ColumnSums | None = None,
    apart: Tensor | None = None,  # (n,) as in `statistics_and_gradients_`
) -> None:
    """The gradients of the products, from statistics that are known.

    The target's probability is that of the statistics: products formed again may differ from the first ones in their
    last bit, which is much beside ``1 - p`` of a confident token. Where tokens that do not count are kept, rows whose
    slopes are all 0 get 0, whatever their logits hold.
    """
    if products.shape[1] == 0:
        return
    overwrite = out is products
    dead = None  # (n,)
    if not counted.drops_ignored(products.device):
        dead = functools.reduce(torch.logical_and, [slope == 0 for slope in slopes if slope is not None])
    for rows, z in _visit(products, logits, overwrite):
        block = known.at(rows)
        dead_rows = None if dead is None else dead[rows].unsqueeze(-1)
        kept = z.clone() if logits.softcap is not None or slopes.mean is not None else None
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
    """``factor * source`` in ``out``; into source itself it costs nothing on a CPU where the factor is 1."""
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
    """A few rows at a time and their logits in the work dtype, in the products' own memory where that may be."""
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


def _store(found: RowStatistics, rows: slice, block: RowStatistics) -> None:
    for whole, part in zip(found, block, strict=True):
        if whole is not None:
            whole[rows] = part


def _exponentiate_(
    z: Tensor,  # (r, V) logits; exp(z - maximum) when it returns
    target: Tensor,  # (r,)
    class_weight: Tensor | None,  # (V,)
    wanted: Wanted,
) -> tuple[RowStatistics, Tensor]:
    """The statistics of a block of rows, and each row's sum of exponentials (r,)."""
    maximum = z.amax(-1)
    correct = (z.argmax(-1) == target).to(z.dtype) if wanted.correct else None
    z.sub_(maximum.unsqueeze(-1))
    at_target = z.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    weighted = None
    if wanted.weighted:
        weighted = z.sum(-1) if class_weight is None else z @ class_weight
    shifted = z.clamp(min=_EXP_IS_ZERO) if wanted.mean else None
    sum_exp = z.exp_().sum(-1)
    mean = None if shifted is None else shifted.mul_(z).sum(-1).div_(sum_exp)
    return RowStatistics(maximum, sum_exp.log(), at_target, weighted, mean, correct), sum_exp


def _gradients_(
    exponentials: Tensor,  # (r, V) exp(z - maximum); the gradients when it returns
    sum_exp: Tensor,  # (r,)
    target: Tensor,  # (r,) -1 where it is none of these columns
    class_weight: Tensor | None,  # (V,)
    slopes: Slopes,
    logits: Logits,
    z: Tensor | None,  # (r, V) the logits, where softcap or mean need them
    rows: RowStatistics,
    columns: ColumnSums | None,
    dead: Tensor | None = None,  # (r, 1)
) -> Tensor:
    """The formula of `chunked_ce.objective`, chained through the softcap. The scale is a factor of the slopes.

    With ``columns``, without what label smoothing adds.
    """
    if slopes.mean is None:
        gradients = exponentials.mul_((slopes.log_sum / sum_exp).unsqueeze(-1))
    else:
        factor = (z - rows.maximum.unsqueeze(-1)).clamp_(min=_EXP_IS_ZERO)
        factor.add_((1 - rows.mean).unsqueeze(-1)).mul_(slopes.mean.unsqueeze(-1))
        factor.add_(slopes.log_sum.unsqueeze(-1)).div_(sum_exp.unsqueeze(-1))
        gradients = exponentials.mul_(factor)
    if columns is not None:
        part = gradients if logits.softcap is None else gradients * _chain(z, logits)
        columns.add(part if dead is None else part.masked_fill(dead, 0), slopes.log_sum)
    column = target.clamp(min=0).unsqueeze(-1)
    at_target = _at_target(slopes, rows).unsqueeze(-1)
    gradients.scatter_(-1, column, at_target.where(target.unsqueeze(-1) >= 0, gradients.gather(-1, column)))
    if slopes.weighted is not None and columns is None:
        weighted = slopes.weighted.unsqueeze(-1)
        gradients.add_(weighted if class_weight is None else weighted * class_weight)
    if logits.softcap is not None:
        gradients.mul_(_chain(z, logits))
    return gradients


def _take_targets_(
    gradients: Tensor,  # (r, V), 0 at the targets when it returns
    target: Tensor,  # (r,) -1 where it is none of these columns
) -> Tensor:
    """The gradients (r,) of the targets, 0 where there is none."""
    column, here = target.clamp(min=0).unsqueeze(-1), target.unsqueeze(-1) >= 0
    found = gradients.gather(-1, column)
    gradients.scatter_(-1, column, found.masked_fill(here, 0))
    return found.where(here, 0).squeeze(-1)


def _at_target(slopes: Slopes, rows: RowStatistics) -> Tensor:
    """The gradients (r,) of the targets' logits, without what label smoothing adds."""
    factor = slopes.log_sum
    if slopes.mean is not None:
        factor = factor + slopes.mean * ((1 - rows.mean) + rows.target.clamp(min=_EXP_IS_ZERO))
    logprob = rows.target - rows.log_sum
    # Of a confident token p - 1 is what counts, and is expm1(log p).
    confident = torch.expm1(logprob) * factor + (factor + slopes.target)
    return confident.where(logprob > _LOG_HALF, logprob.exp() * factor + slopes.target)


def _chain(z: Tensor, logits: Logits) -> Tensor:
    """The derivative of the softcap where the logits are ``z``."""
    return 1 - (z / logits.softcap).square_()
