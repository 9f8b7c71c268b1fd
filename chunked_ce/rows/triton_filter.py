"""The passes of the gradient filter on an accelerator, in Triton: the twins of those in `chunked_ce.rows.torch_filter`.

The host launches them before it knows how many columns a chunk keeps, except `head_rows`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from chunked_ce.rows import triton_filter_kernels as kernels
from chunked_ce.rows.torch_filter import PADDED
from chunked_ce.rows.triton_jit import device_of

__all__ = ["compact_at", "finished", "head_rows", "summed_tail", "tail_columns_"]

_ROWS, _COLUMNS = 32, 128  # the tile of a chunk's gradients that a program holds: 11 instructions per element
_ENTRIES, _ELEMENTS = 32, 128  # the tile of the head or of its gradient
_PROGRAMS = 1024  # at least, where there is as much work
_FACTORS = 16  # rows and columns of the least matrix product


def compact_at(
    gradients: Tensor,  # (C, V), each row contiguous
    place: Tensor,  # (V,) int32
    skip: Tensor,  # ()
    num_groups: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`chunked_ce.rows.torch_filter.compact_at`; with ``skip``, nothing is read and the results hold anything."""
    n, vocab_size = gradients.shape
    kept = gradients.new_empty(n, width)
    programs = triton.cdiv(n, _ROWS)
    splits, blocks = _splits(programs, triton.cdiv(vocab_size, _COLUMNS))
    left = torch.empty(splits, n, num_groups, dtype=torch.float32, device=gradients.device)
    with device_of(gradients):
        kernels.compact_kernel[(programs, splits)](
            gradients,
            gradients.stride(0),
            place,
            skip,
            kept,
            kept.stride(0),
            left,
            n,
            vocab_size,
            width,
            blocks,
            NUM_GROUPS=num_groups,
            GROUPS=_FACTORS,
            ROWS=_ROWS,
            BLOCK=_COLUMNS,
            num_warps=4,
        )
    return kept, left[0] if splits == 1 else left.sum(0)


def tail_columns_(
    kept: Tensor,  # (C, width)
    left: Tensor,  # (C, k) fp32
    count: Tensor,  # ()
    scale: float,
) -> None:
    """`chunked_ce.rows.torch_filter.tail_columns_`."""
    n, num_tails = left.shape
    with device_of(kept):
        kernels.tail_columns_kernel[(triton.cdiv(n, _ROWS),)](
            left.contiguous(),
            count,
            kept,
            kept.stride(0),
            n,
            kept.shape[1],
            scale,
            NUM_TAILS=num_tails,
            PADDED=PADDED,
            ROWS=_ROWS,
            BLOCK=triton.next_power_of_2(3 * num_tails + PADDED),
            num_warps=4,
        )


def summed_tail(
    right: Tensor,  # (V, k) fp32
    weight: Tensor,  # (V, D)
    skip: Tensor,  # ()
) -> Tensor:
    """`chunked_ce.rows.torch_filter.summed_tail`; with ``skip``, nothing is read and the result holds anything."""
    (vocab_size, hidden_size), num_tails = weight.shape, right.shape[1]
    programs, factors = triton.cdiv(hidden_size, _ELEMENTS), max(_FACTORS, triton.next_power_of_2(2 * num_tails))
    splits, blocks = _splits(programs, triton.cdiv(vocab_size, _ENTRIES))
    rows = torch.empty(splits, factors, hidden_size, dtype=torch.float32, device=weight.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    with device_of(weight):
        kernels.tail_rows_kernel[(programs, splits)](
            right.contiguous(),
            weight,
            weight.stride(0),
            skip,
            rows,
            vocab_size,
            hidden_size,
            2.0 ** (vocab_size.bit_length() // 2),  # 1 / V is in the range of fp16
            blocks,
            NUM_TAILS=num_tails,
            FACTORS=factors,
            ENTRIES=_ENTRIES,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return torch.unflatten(rows[:, : 2 * num_tails], 1, (2, num_tails)).sum((0, 1))


def head_rows(
    weight: Tensor,  # (V, D)
    place: Tensor,  # (V,) int32
    tail: Tensor,  # (k, D) fp32
    count: int,
    width: int,
    scale: float,
) -> Tensor:
    """`chunked_ce.rows.torch_filter.head_rows`."""
    vocab_size, hidden_size = weight.shape
    out = weight.new_empty(width, hidden_size)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    programs = triton.cdiv(vocab_size, _ENTRIES) + triton.cdiv(width - count, _ENTRIES)
    with device_of(weight):
        kernels.head_rows_kernel[(programs,)](
            weight,
            weight.stride(0),
            place,
            tail.contiguous(),
            out,
            vocab_size,
            hidden_size,
            count,
            width,
            scale,
            NUM_TAILS=len(tail),
            ENTRIES=_ENTRIES,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return out


def finished(
    out: Tensor,  # (V, D) contiguous
    total: Tensor | None,  # (V, D) contiguous; may be out
    parts: Tensor | None,  # (R, D) fp32
    places: Tensor | None,  # (chunks, V) int32, with parts
    right: Tensor,  # (V, k) fp32
    left: Tensor,  # (k, D) fp32
    factor: Tensor | None = None,  # ()
) -> Tensor:
    """`chunked_ce.rows.torch_filter.finished`."""
    vocab_size, hidden_size = out.shape
    if out.numel() == 0:
        return out
    grid = triton.cdiv(vocab_size, _ENTRIES), triton.cdiv(hidden_size, _ELEMENTS)
    with device_of(out):
        kernels.finish_kernel[grid](
            total,
            parts,
            places,
            right.contiguous(),
            left.contiguous(),
            factor,
            out,
            vocab_size,
            hidden_size,
            0 if places is None else len(places),
            right.shape[1],
            ENTRIES=_ENTRIES,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return out


def _splits(programs: int, blocks: int) -> tuple[int, int]:
    """Into how many parts ``blocks`` are split so that ``programs`` for each part are enough, and a part's blocks."""
    blocks_per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, programs)))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split
