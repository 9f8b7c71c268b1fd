"""Large scratch memory."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from chunked_ce import devices

__all__ = ["cast_with_room", "logits_scratch", "scratch", "with_padding"]

# Touching 206 MiB of logits for the first time took 0.16 s, in huge pages 0.07 s; all three bf16 products of that chunk
# took 0.29 s.
_LEAST_HUGE = 8 * 2**20


def scratch(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, on a CPU in huge pages where the system has them."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST_HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def logits_scratch(tokens: int, entries: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`scratch` (tokens, entries); on an accelerator, rows begin where it reads and writes fastest."""
    if not devices.is_accelerator(device.type):
        return scratch(tokens, entries, dtype=dtype, device=device)
    return scratch(tokens, devices.padded_row(entries), dtype=dtype, device=device)[:, :entries]


def cast_with_room(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (V, ...) in ``dtype``; a copy of them on an accelerator has room for the padding of rows of logits."""
    if values.dtype == dtype or not devices.is_accelerator(values.device.type):
        return values.to(dtype)
    whole = values.new_empty(devices.padded_row(len(values)), *values.shape[1:], dtype=dtype)
    return whole[: len(values)].copy_(values)


def with_padding(values: Tensor, dim: int = 0) -> Tensor | None:
    """``values`` with what lies behind dimension ``dim`` in memory, as far as rows of logits are padded.

    None where the memory ends before, or the result would not be dense.
    """
    shape = list(values.shape)
    shape[dim] = devices.padded_row(shape[dim])
    strides = tuple(math.prod(shape[at:]) for at in range(1, values.dim() + 1))
    stop = values.storage_offset() + math.prod(shape)
    if values.stride() != strides or stop * values.itemsize > values.untyped_storage().nbytes():
        return None
    return values.as_strided(shape, strides)
