"""The row kernels of `chunked_ce.engine.rows` in Triton.

Statistics read each logit once; gradients read and write it once, column sums of the gradient filter included.

`chunked_ce.engine.kernels` says where they can run; `chunked_ce.engine.rows` is their twin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from chunked_ce.engine import triton_kernels as kernels
from chunked_ce.engine.columns import ColumnSums
from chunked_ce.engine.rows import Slopes, Wanted
from chunked_ce.objective import Logits, RowStatistics

__all__ = [
    "logit_gradients",
    "rows_in_flight",
    "scale_into",
    "shard_statistics",
    "statistics",
    "statistics_and_gradients_",
]

_BLOCK = 4096  # logits of a row that a program holds at a time: 16 in each of 256 threads
_ROWS, _COLUMNS = 32, 128  # what a program holds of a block of columns


def rows_in_flight(vocab_size: int, device_type: str) -> int:
    """All rows: a program takes one, and nothing of a row is kept in memory."""
    return 2**31 // max(1, triton.cdiv(vocab_size, _BLOCK)) - 1


def statistics(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    wanted: Wanted,
    *,
    overwrite: bool,
) -> RowStatistics:
    """The statistics of each row; the products are kept, with ``overwrite`` too."""
    found = torch.empty(3 + sum(wanted), len(products), dtype=torch.float32, device=products.device)
    _find(products, target, None, class_weight, logits, wanted, found.t())
    parts = iter(found.unbind())
    return RowStatistics(*(next(parts) if need else None for need in (True, True, True, *wanted)))


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

    The products are kept, with ``overwrite`` too.
    """
    columns = 3 + 2 * wanted.weighted + wanted.mean + wanted.correct
    parts = torch.empty(len(products), columns, dtype=torch.float32, device=products.device)
    if products.shape[1] == 0:
        parts.zero_()
        parts[:, 0] = parts[:, 2] = -torch.inf
        return parts
    _find(products, target, here, class_weight, logits, wanted, parts, start)
    return parts


def statistics_and_gradients_(
    products: Tensor,  # (n, V): the gradients when it returns
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    wanted: Wanted,
    slopes_of: Callable[[RowStatistics, slice], Slopes],
    columns: ColumnSums | None = None,
) -> RowStatistics:
    """The statistics of each row, and the gradients that ``slopes_of`` makes of them written over the products."""
    found = statistics(products, target, class_weight, logits, wanted, overwrite=False)
    slopes = slopes_of(found, slice(None))
    logit_gradients(products, target, class_weight, logits, slopes, found, out=products, columns=columns)
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
) -> None:
    """The gradients of the products, from statistics that are known, zero in rows whose slopes are all 0."""
    n, vocab_size = products.shape
    if products.numel() == 0:
        return
    if columns is not None:  # which go without what label smoothing adds
        slopes = slopes._replace(weighted=None)
    tensors = (
        products,
        *products.stride(),
        out,
        *out.stride(),
        target.contiguous(),
        _contiguous(class_weight),
        known.maximum.contiguous(),
        known.log_sum.contiguous(),
        known.target.contiguous(),
        _contiguous(known.mean if slopes.mean is not None else None),
        *map(_contiguous, slopes),
    )
    with torch.cuda.device_of(products):
        if columns is None:
            block, warps = _block_of(vocab_size)
            blocks = triton.cdiv(vocab_size, block)
            kernels.gradients_kernel[(n * blocks,)](*tensors, vocab_size, blocks, *logits, BLOCK=block, num_warps=warps)
        else:
            kernels.gradients_and_columns_kernel[(triton.cdiv(vocab_size, _COLUMNS),)](
                *tensors,
                columns.largest,
                columns.total,
                n,
                vocab_size,
                *logits,
                ROWS=_ROWS,
                BLOCK=_COLUMNS,
                num_warps=4,
            )


def scale_into(
    source: Tensor,  # contiguous
    factor: Tensor,  # () on the device
    out: Tensor,  # as source, contiguous; may be source itself
) -> Tensor:
    """``factor * source`` in ``out``; into source itself it costs nothing where the factor is 1."""
    if source.numel() > 0:
        with torch.cuda.device_of(source):
            kernels.scale_kernel[(triton.cdiv(source.numel(), _BLOCK),)](
                source, factor, out, source.numel(), IN_PLACE=out is source, BLOCK=_BLOCK, num_warps=8
            )
    return out


def _find(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    here: Tensor | None,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    wanted: Wanted,
    found: Tensor,  # (n, statistics)
    start: int = 0,
) -> None:
    n, vocab_size = products.shape
    if n == 0:
        return
    block, warps = _block_of(vocab_size)
    with torch.cuda.device_of(products):
        kernels.statistics_kernel[(n,)](
            products,
            *products.stride(),
            target.contiguous(),
            None if here is None else here.contiguous().view(torch.uint8),
            _contiguous(class_weight),
            found,
            *found.stride(),
            vocab_size,
            *logits,
            start,
            SHARD=here is not None,
            WEIGHTED=wanted.weighted,
            MEAN=wanted.mean,
            CORRECT=wanted.correct,
            BLOCK=block,
            num_warps=warps,
        )


def _block_of(vocab_size: int) -> tuple[int, int]:
    """Logits that a program holds at a time, and its warps."""
    block = min(_BLOCK, max(128, triton.next_power_of_2(vocab_size)))
    return block, max(1, block // 512)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
