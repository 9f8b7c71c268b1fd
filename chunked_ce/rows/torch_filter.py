"""The passes of the gradient filter in torch: over a chunk's logit gradients, and over the gradient of the head.

`chunked_ce.engine.filtered` has the maths around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce.rows.statistics import work_dtype

__all__ = ["compact", "finish", "tail_rows"]

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
    torch.gather(gradients, 1, index.expand(len(gradients), -1), out=kept[:, : len(index)])
    kept[:, len(index) :] = 0
    members = group.unsqueeze(1) == torch.arange(num_groups, device=group.device)  # (V, g)
    left = gradients @ members.to(gradients.dtype)
    return kept, left.to(work_dtype(left.dtype))


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
