"""The passes of the gradient filter in torch: over a chunk's logit gradients, and over the gradient of the head.

`chunked_ce.engine.filtered` has the maths around them. On an accelerator, whose host knows the number of kept columns
only later, the passes are `compact_at`, `tail_columns_`, `summed_tail`, `head_rows` and `finished`, the slow twins of
those in `chunked_ce.rows.triton_filter`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistics import work_dtype

__all__ = [
    "PADDED",
    "compact",
    "compact_at",
    "finish",
    "finished",
    "head_rows",
    "padded",
    "summed_tail",
    "tail_columns_",
    "tail_rows",
]

PADDED = 64  # an accelerator's products are fastest where their widths are multiples of it, and it reuses equal sizes
_SUMMED_ENTRIES = 4096  # of the vocabulary: their part of the tail is rounded before it is added


def compact(
    gradients: Tensor,  # (C, V) of a chunk's logits
    index: Tensor,  # (K,) the kept columns, in order
    group: Tensor,  # (V,) the group of each dropped column, -1 where kept
    num_groups: int,
    width: int,  # K at least
) -> tuple[Tensor, Tensor]:
    """The kept columns, (C, width) with zeros behind them, and the sums of each group's columns, (C, g) in fp32.

    The sums of fp64 gradients are in fp64.
    """
    kept = gradients.new_empty(len(gradients), width)
    # Unlike `gather`, it copies no index, and unlike `index_select` it takes both cores to single columns.
    torch.ops.aten.index.Tensor_out(gradients, [None, index], out=kept[:, : len(index)])
    kept[:, len(index) :] = 0
    members = group == torch.arange(num_groups, device=group.device).unsqueeze(1)  # (g, V)
    left = _times(gradients, members.to(gradients.dtype))
    return kept, left.to(work_dtype(left.dtype))


def _times(
    gradients: Tensor,  # (C, V)
    members: Tensor,  # (g, V)
) -> Tensor:
    """``gradients @ members.T``, (C, g): a CPU reads bf16 factors twice as fast for the transposed product."""
    if gradients.dtype == torch.bfloat16:
        return (members @ gradients.t()).t()
    return gradients @ members.t()


def tail_rows(
    right: Tensor,  # (V, k)
    weight: Tensor,  # (V, D) of the head
) -> Tensor:
    """``right.T @ weight``, (k, D) in the dtype of ``right``."""
    scale = 2.0 ** (len(weight).bit_length() // 2)  # keeps 1 / V in the range of fp16
    scaled = right.t() * scale
    rows = right.new_zeros(right.shape[1], weight.shape[1])
    for start in range(0, len(weight), _SUMMED_ENTRIES):
        block = slice(start, start + _SUMMED_ENTRIES)
        rows += scaled[:, block].to(weight.dtype) @ weight[block]
    return rows.div_(scale)


def finish(
    total: Tensor,  # (V, D) or (V,)
    right: Tensor,  # (V, k) of all chunks
    left: Tensor,  # (k, D) or (k,)
) -> Tensor:
    """Add ``right @ left``, the tails of all chunks, to ``total``."""
    add = total.addmm_ if total.ndim == 2 else total.addmv_
    return add(right.to(total.dtype), left.to(total.dtype))


def padded(width: int) -> int:
    """The least multiple of `PADDED` that is ``width`` at least."""
    return width + -width % PADDED


def in_two(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``values`` as a sum of two tensors in ``dtype``."""
    first = values.to(dtype)
    return first, (values - first).to(dtype)


def compact_at(
    gradients: Tensor,  # (C, V) of a chunk's logits
    place: Tensor,  # (V,) int32 of a column among the kept ones, or -1 - the group of a dropped one
    skip: Tensor,  # () not 0 if the results will not be used
    num_groups: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The kept columns at their places, (C, width), and the sums of each group's columns, (C, g) in fp32.

    Kept columns with a place from ``width`` on are left out. What is behind the kept columns may be anything.
    """
    index = ((place >= 0) & (place < width)).nonzero().squeeze(1)
    return compact(gradients, index, -1 - place, num_groups, width)


def tail_columns_(
    kept: Tensor,  # (C, width)
    left: Tensor,  # (C, k) fp32
    count: Tensor,  # () the number of kept columns, which may be more than width
    scale: float,
) -> None:
    """Write ``left / scale`` behind the kept columns, in two parts and the first one twice, then zeros up to a multiple
    of `PADDED` columns. What would stand beyond ``width`` is left out."""
    first, rest = in_two(left / scale, kept.dtype)
    start, end = int(count), padded(int(count) + 3 * left.shape[1])
    room = kept[:, start : min(end, kept.shape[1])]
    columns = torch.nn.functional.pad(torch.cat([first, first, rest], 1), (0, PADDED))
    room.copy_(columns[:, : room.shape[1]])


def summed_tail(
    right: Tensor,  # (V, k) fp32
    weight: Tensor,  # (V, D) of the head
    skip: Tensor,  # () not 0 if the result will not be used
) -> Tensor:
    """``right.T @ weight``, (k, D) in fp32, with ``right`` unrounded."""
    return right.t() @ weight.to(right.dtype)


def head_rows(
    weight: Tensor,  # (V, D)
    place: Tensor,  # (V,) int32
    tail: Tensor,  # (k, D) fp32 of `summed_tail`
    count: int,  # the kept columns
    width: int,  # count + 3 k at least
    scale: float,
) -> Tensor:
    """The partners of the columns of `compact_at` and `tail_columns_` in the product for the hidden states, (width, D):
    the kept rows of the head, ``scale * tail`` in two parts, the first one once more, and zeros."""
    first, rest = in_two(tail * scale, weight.dtype)
    out = weight.new_zeros(width, weight.shape[1])
    torch.cat([weight[place >= 0], first, rest, first], out=out[: count + 3 * len(tail)])
    return out


def finished(
    out: Tensor,  # (V, D)
    total: Tensor | None,  # (V, D); may be out
    parts: Tensor | None,  # (R, D) the kept rows of all chunks' gradients, fp32
    places: Tensor | None,  # (chunks, V) int32, the row of each entry in the parts, negative where it was dropped
    right: Tensor,  # (V, k) of all chunks, fp32
    left: Tensor,  # (k, D) of all chunks, fp32
    factor: Tensor | None = None,  # ()
) -> Tensor:
    """Write ``factor * (total + kept rows + right @ left)`` to ``out``, rounded once."""
    sums = right @ left
    for place in not_none(places) if parts is not None else ():
        sums += not_none(parts)[place.clamp(min=0)].masked_fill((place < 0).unsqueeze(1), 0)
    if total is not None:
        sums += total
    return out.copy_(sums if factor is None else sums * factor)
