"""How much memory a piece of a program takes at its peak."""

import contextlib
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak since it was made, in bytes, above what there was at that moment.

    With CUDA: of the tensors on the device (`torch.cuda.max_memory_allocated`). Else: of the process's
    resident memory, everything in it included, as Linux counts it (`VmHWM` above the first `VmRSS`).
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        # Sets VmHWM back to VmRSS. Where that is forbidden, an earlier peak can hide a later one.
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")
        self.before = resident("VmRSS")

    def bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return max(0, peak - self.before)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
