"""The row kernels of `chunked_ce.rows.torch_rows` in Triton, for every statistic that these kernels compute.

Statistics read each logit once; gradients read and write it once, column sums of the gradient filter included.

`chunked_ce.rows.backend` says where they can run; `chunked_ce.rows.torch_rows` is their twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import triton
from torch import Tensor

from chunked_ce import devices
from chunked_ce.narrowing import not_none
from chunked_ce.rows import torch_rows
from chunked_ce.rows import triton_kernels as kernels
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import (
    NOTHING,
    STATISTICS,
    Logits,
    PerRow,
    RowStatistics,
    columns_of,
    empty_part,
    num_columns,
    statistics_of,
)
from chunked_ce.rows.triton_jit import device_of

__all__ = [
    "logit_gradients",
    "rows_in_flight",
    "scale_into",
    "shard_statistics",
    "statistics",
    "statistics_and_gradients_",
]

_BLOCK = 4096  # logits of a row that a program holds at a time: 16 in each of 256 threads
_ACCESS = 16  # bytes that a thread reads or writes at a time
_FUSED = {"enable_fp_fusion": True}  # multiplications and additions, whatever Triton's default
_ROWS, _COLUMNS = 32, 128  # the tile of a block of columns that a program holds


def rows_in_flight(vocab_size: int, device_type: str) -> int:
    """As many rows as a launch takes: the kernels keep nothing of a row in memory."""
    blocks: int = triton.cdiv(vocab_size, _BLOCK)
    return 2**31 // max(1, blocks) - 1


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
    """The statistics of each row; the products are kept, even with ``overwrite``."""
    part = _part(products, target, class_weight, logits, names, 0, whole=True, per_row=per_row)
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
    per_row: PerRow = NOTHING,
) -> Tensor:
    """This shard's part of the statistics of each row, (n, columns): see `chunked_ce.rows.statistics`.

    The products are kept, even with ``overwrite``.
    """
    if products.shape[1] == 0:
        return empty_part(len(products), names, torch.float32, products.device)
    return _part(products, target, class_weight, logits, names, start, whole=False, per_row=per_row)


def statistics_and_gradients_(
    products: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    names: tuple[str, ...],
    slopes_of: Callable[[RowStatistics, slice], RowStatistics],
    slope_names: Iterable[str] = (),
    out: Tensor | None = None,  # as products, None for products itself
    columns: ColumnSums | None = None,
    *,
    per_row: PerRow = NOTHING,
) -> RowStatistics:
    """The statistics of each row; the gradients, with slopes from ``slopes_of``, are written to ``out``."""
    rows = statistics(products, target, class_weight, logits, names, overwrite=False, per_row=per_row)
    slopes = slopes_of(rows, slice(None))
    arguments = products, target, class_weight, logits, slopes, rows
    logit_gradients(*arguments, out=products if out is None else out, columns=columns, per_row=per_row)
    return rows


def logit_gradients(
    products: Tensor,  # (n, V), or (n, B) for a block of the vocabulary
    target: Tensor,  # (n,) column of the target, -1 where it is in no column
    class_weight: Tensor | None,  # (V,) or (B,)
    logits: Logits,
    slopes: RowStatistics,
    known: RowStatistics,  # over the whole vocabulary
    out: Tensor,  # as products; may be products itself
    columns: ColumnSums | None = None,
    *,
    per_row: PerRow = NOTHING,
) -> None:
    """Write the gradients of the products to ``out``, from known statistics; 0 in rows whose slopes are all 0.

    Where the rows of both are padded, what lies behind the vocabulary in those of ``out`` is overwritten.
    """
    n, vocab_size = products.shape
    if products.numel() == 0:
        return
    if slopes.total is not None:
        if class_weight is not None:
            arguments = products, target, class_weight, logits, slopes, known, out
            torch_rows.logit_gradients(*arguments, per_row=per_row)
            return
        # Without class weights, both are added to the gradients of all logits.
        weighted = slopes.total if slopes.weighted is None else slopes.weighted + slopes.total
        slopes = slopes._replace(weighted=weighted, total=None)
    elif columns is not None:  # the filter, which is for no slope in ``total``, adds the term of label smoothing itself
        slopes = slopes._replace(weighted=None)
    tensors = (
        products,
        *products.stride(),
        out,
        *out.stride(),
        target.contiguous(),
        _contiguous(class_weight),
        _contiguous(per_row.temperature),
        not_none(known.maximum).contiguous(),
        known.log_sum.contiguous(),
        known.target.contiguous(),
        _contiguous(known.mean if slopes.mean is not None else None),
        _contiguous(known.squares if slopes.squares is not None else None),
        *map(_contiguous, (slopes.log_sum, slopes.target, slopes.weighted, slopes.mean, slopes.squares)),
    )
    width = min(_width(products), _width(out))
    with device_of(products):
        if columns is None:
            block, warps = _block_of(vocab_size)
            blocks = triton.cdiv(vocab_size, block)
            kernels.gradients_kernel[(n * blocks,)](
                *tensors, vocab_size, width, blocks, *_scalars(logits), BLOCK=block, num_warps=warps, **_FUSED
            )
        else:
            kernels.gradients_and_columns_kernel[(triton.cdiv(vocab_size, _COLUMNS),)](
                *tensors,
                columns.largest,
                columns.total,
                n,
                vocab_size,
                width,
                *_scalars(logits),
                ROWS=_ROWS,
                BLOCK=_COLUMNS,
                num_warps=4,
                **_FUSED,
            )


def scale_into(
    source: Tensor,  # contiguous
    factor: Tensor,  # () on the device
    out: Tensor,  # as source, contiguous; may be source itself
) -> Tensor:
    """Write ``factor * source`` to ``out``; in place, a factor of 1 costs nothing."""
    if source.numel() > 0:
        with device_of(source):
            kernels.scale_kernel[(triton.cdiv(source.numel(), _BLOCK),)](
                source, factor, out, source.numel(), IN_PLACE=out is source, BLOCK=_BLOCK, num_warps=8
            )
    return out


def _part(
    products: Tensor,  # (n, V_r)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (V_r,)
    logits: Logits,
    names: tuple[str, ...],
    start: int,
    *,
    whole: bool,
    per_row: PerRow,
) -> Tensor:
    n, vocab_size = products.shape
    part = torch.empty(n, num_columns(names), dtype=torch.float32, device=products.device)
    if n == 0:
        return part
    block, warps = _block_of(vocab_size)
    places = columns_of(names)
    at = {
        name.upper(): places[name].start if name in places else -1 for name in STATISTICS if STATISTICS[name].in_triton
    }
    del at["MAXIMUM"]  # always the first
    with device_of(products):
        kernels.statistics_kernel[(n,)](
            products,
            *products.stride(),
            target.contiguous(),
            _contiguous(class_weight),
            _contiguous(per_row.temperature),
            part,
            *part.stride(),
            vocab_size,
            _width(products),
            *_scalars(logits),
            start,
            WHOLE=whole,
            **at,
            GROUP=_ACCESS // products.itemsize,
            BLOCK=block,
            num_warps=warps,
            **_FUSED,
        )
    return part


def _block_of(vocab_size: int) -> tuple[int, int]:
    """The number of logits that a program holds at a time, and its number of warps."""
    block = min(_BLOCK, max(128, triton.next_power_of_2(vocab_size)))
    return block, max(1, block // 512)


def _scalars(logits: Logits) -> tuple[float | None, float | None, float | None]:
    """The scale, the softcap and its inverse as the kernels take them: a scale of 1 is None, and costs nothing."""
    scale, softcap = logits
    return None if scale == 1.0 else scale, softcap, None if softcap is None else 1.0 / softcap


def _width(rows: Tensor) -> int:
    """How many entries of each of the rows (n, V) may be accessed: V, and the padding of `logits_scratch`."""
    n, vocab_size = rows.shape
    padded = devices.padded_row(vocab_size)
    stride, step = rows.stride()
    if step != 1 or stride % devices.ROW_MULTIPLE or padded > stride:
        return vocab_size
    last = rows.storage_offset() + (n - 1) * stride + padded
    return padded if last * rows.itemsize <= rows.untyped_storage().nbytes() else vocab_size


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
