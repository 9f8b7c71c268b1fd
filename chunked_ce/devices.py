"""How the work differs by device and dtype."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING

from chunked_ce.light import LIGHT, torch

if TYPE_CHECKING or not LIGHT:
    from torch import Tensor

    from chunked_ce.tracing import is_recorded


__all__ = [
    "PROJECTED_ROWS",
    "ROW_MULTIPLE",
    "adds_in_product",
    "captures",
    "is_accelerator",
    "keeps_scratch",
    "moved",
    "padded_row",
    "product_rows",
    "read",
    "reads_at_once",
    "rounds_products",
    "rounds_within",
    "start_reading",
    "unrounded",
    "widened_rows",
]

# Rows of the head in one product on a CPU. A block of the head is packed once and stays in cache: with 512 tokens,
# D=768 and V=50257 on two cores, the logits took 0.084 s in bf16 and 0.430 s in fp32, as one product 0.124 and 0.467.
# Smaller blocks are no faster, and much slower if other work keeps one of the cores busy.
PROJECTED_ROWS = 8192
ROW_MULTIPLE = 16  # elements: an accelerator moves up to 32 bytes at a time, from a multiple of them
_LEAST_KEPT, _MOST_KEPT = 8 * 2**20, 256 * 2**20  # bytes of scratch memory that a process keeps
_WIDENED_ROWS = 2048  # each block is read from cache right after it was cast
# Rows, at a time, of a sum whose dtype differs from its products': product and sum meet in cache.
_SUMMED_ROWS = 2048


def is_accelerator(device_type: str) -> bool:
    """Whether products run on another device than the CPU, many times as fast as the memory is read."""
    return device_type != "cpu"


def product_rows(rows: int, device_type: str) -> int:
    """How many rows of a sum one product covers, if their dtypes differ."""
    return min(rows, _SUMMED_ROWS) if device_type == "cpu" else rows


def widened_rows(rows: int) -> int:
    """How many rows of a head are cast to a wider dtype at a time, where the device forms no wide product of it."""
    return max(1, min(rows, _WIDENED_ROWS))


def padded_row(entries: int) -> int:
    """The elements of a row of ``entries`` logits behind which an accelerator reads and writes the next row fastest."""
    return entries + -entries % ROW_MULTIPLE


def adds_in_product(device_type: str, total: torch.dtype, factor: torch.dtype) -> bool:
    """Whether products of factors in dtype ``factor`` add to a sum in dtype ``total`` as they are formed.

    ROCm, which calls its devices ``"cuda"`` too, has no products with ``out_dtype``, and NVIDIA's devices before sm_80
    none of bf16.
    """
    if device_type != "cuda" or torch.version.hip or total != torch.float32:
        return False
    return factor == torch.float16 or (factor == torch.bfloat16 and _multiplies_bf16())


def _multiplies_bf16() -> bool:
    """Whether all CUDA devices of this process have products of bf16; yes as long as it uses none."""
    return not torch.cuda.is_initialized() or _least_capability() >= (8, 0)


@functools.cache
def _least_capability() -> tuple[int, int]:
    return min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient until the upstream gradient is known, so that it is rounded to ``dtype`` once."""
    return torch.promote_types(dtype, torch.float32)


def rounds_products(device_type: str, factor: torch.dtype) -> bool:
    """Whether the device rounds products of factors in dtype ``factor`` to this, narrow, dtype."""
    return device_type == "cpu" and factor in (torch.bfloat16, torch.float16)


def rounds_within(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a product that adds to a total in ``dtype`` rounds to it after every few terms. For narrow totals the
    device sums all terms first."""
    return device_type == "cpu" and dtype.itemsize >= 4


def reads_at_once(device: torch.device) -> bool:
    """Whether the host reads values on ``device`` without waiting: they are in its own memory."""
    return device.type == "cpu"


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on ``device``: the host must not wait, nor decide by values."""
    return device.type == "cuda" and not is_recorded() and torch.cuda.is_current_stream_capturing()


def read(values: Tensor) -> Tensor:
    """``values`` on the host, which waits for all work that the device was given before."""
    return values.cpu()


def start_reading(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy ``values`` to the host; the function that is returned waits for the copy and returns it.

    A CUDA device goes on with work that it is given after this call; others have done it when the copy is there.
    """
    if values.device.type != "cuda":
        return functools.partial(read, values)
    with torch.cuda.device_of(values):
        copy, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()

    def finish() -> Tensor:
        event.synchronize()
        return copy

    return finish


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host does not wait, which takes pinned memory on the way to a CUDA device."""
    if values.device.type == "cpu" and device.type == "cuda" and not is_recorded():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def keeps_scratch(size: int, device_type: str) -> bool:
    """Whether scratch memory of ``size`` bytes is kept for the next call: on a CPU the system gives it out anew, page
    by page, but an accelerator's allocator keeps all memory."""
    return device_type == "cpu" and hasattr(mmap, "MADV_FREE") and _LEAST_KEPT <= size <= _MOST_KEPT
