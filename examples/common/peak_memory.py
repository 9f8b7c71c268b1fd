"""Measures the peak memory of a part of a program."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from chunked_ce.engine.scratch import release

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak in bytes since the object was created, above the memory in use at that moment.

    With CUDA, it counts the tensors on the device (`torch.cuda.max_memory_allocated`). Without, it counts
    all resident memory of the process, as Linux reports it (`VmHWM` above the first `VmRSS`).
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        gc.collect()
        release()  # the logits' memory that chunked_ce keeps between calls on a CPU: the next call counts it anew
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        # Memory that was freed but is still resident would not be counted again. Not every C library has this function.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        # Resets VmHWM to VmRSS. Where that is forbidden, an earlier peak can hide a later one.
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")
        self.before = resident("VmRSS")

    def bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return max(0, peak - self.before)

    def held(self) -> int:
        """The bytes in use now, above those at the creation; without what is only kept for the next call."""
        release()
        now = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")
        return max(0, now - self.before)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
