"""Large scratch memory.

On a CPU the system gives out memory page by page as it is first written, in zeros. This took 0.07 s for the 206 MiB of
logits of 2,048 tokens and 50,257 entries where huge pages were free, 0.16 s where none was, and 0.4 s where the system
had to make room for them; all bf16 products of them took 1.4 s. So a process keeps the largest piece of up to 256 MiB
that a call is done with for the next one. Meanwhile its pages are free to take: a system that runs short of memory
takes them without asking, and `release` gives them back at once.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref

import torch
from torch import Tensor

from chunked_ce import devices

__all__ = ["cast_with_room", "logits_scratch", "release", "scratch", "with_padding"]

_LEAST_HUGE = 8 * 2**20
_kept: list[mmap.mmap] = []  # at most one, which no tensor uses


def release() -> None:
    """Give the memory that is kept between calls back to the system."""
    _kept.clear()


def scratch(*shape: int, dtype: torch.dtype, device: torch.device, keep: bool = False) -> Tensor:
    """An uninitialised tensor, on a CPU in huge pages where the system has them.

    With ``keep``, its memory is kept for the next call once no tensor uses it, if `devices.keeps_scratch` allows.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _LEAST_HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    keep = keep and devices.keeps_scratch(size, device.type)
    memory = _take(size) if keep else None
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)  # lives as long as the tensor's storage
    if keep:
        weakref.finalize(view, _keep, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def _take(size: int) -> mmap.mmap | None:
    """The memory that is kept, if it is large enough; it is given back if it is not."""
    try:
        memory = _kept.pop()
    except IndexError:
        return None
    return memory if len(memory) >= size else None


def _keep(memory: mmap.mmap) -> None:
    with contextlib.suppress(OSError):  # a kernel that cannot take pages back later
        memory.madvise(mmap.MADV_FREE)
        _kept[:] = [max([*_kept, memory], key=len)]


def logits_scratch(
    tokens: int, entries: int, *, dtype: torch.dtype, device: torch.device, keep: bool = False
) -> Tensor:
    """`scratch` (tokens, entries); on an accelerator, rows begin where it reads and writes fastest."""
    if not devices.is_accelerator(device.type):
        return scratch(tokens, entries, dtype=dtype, device=device, keep=keep)
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
