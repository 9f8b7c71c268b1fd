"""Peak memory of a piece of work, and the memory that a device has.

On CUDA the peak is that of torch's allocator. On the CPU it is that of the process's resident memory (Linux), which
includes what the matrix library and the C allocator keep, so measure in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from chunked_ce.engine import scratch

__all__ = ["available", "limit_memory", "out_of_memory", "peak_of", "total", "why_not_measured"]

_CLEAR_REFS = "/proc/self/clear_refs"
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


def why_not_measured(device: str) -> str | None:
    """Why the peak cannot be measured here; None if it can."""
    if device == "cpu" and not os.access(_CLEAR_REFS, os.W_OK):
        return f"peak memory of a process is reset by writing to {_CLEAR_REFS}, which is not writable here"
    return None


def peak_of(work: Callable[[], object], device: str) -> int:
    """Bytes at the peak of ``work()`` above those in use before it. Warm up first."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Free pages that the C allocator or an earlier call holds go back to the system, or the work would use them unseen.
    scratch.release()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    Path(_CLEAR_REFS).write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def total(device: str) -> int:
    """Bytes of memory of the device, or of this machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def available(device: str) -> int:
    """Bytes of that memory which are free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def limit_memory(size: int, device: str) -> None:
    """Let this process take ``size`` more bytes; beyond them allocation fails, instead of the machine swapping."""
    if device == "cuda":
        torch.cuda.empty_cache()  # free memory that the allocator holds would count as taken
        allowed = (torch.cuda.memory_allocated() + size) / total(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed))
        return
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows, and not all of it on macOS
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + size, hard))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)


def _status(name: str) -> int:
    """A number of /proc/self/status in bytes: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
