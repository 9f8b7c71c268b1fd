"""Whether other work on the machine disturbed a measurement.

Two signs. A control task, the same matrix product each time, is timed before and after an implementation: if it takes
longer than at its quickest, the machine was slower. And while rounds run, the processor time that other processes take
on the cores of this one, and the time that a hypervisor keeps from them, are counted: work that waits for a core at the
end of each of its many small parallel regions is slowed much more than the control task, or evenly from start to end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from chunked_ce.cli.documents import BUSY, Result

__all__ = ["ADVICE", "CoreTimes", "Watch", "control_seconds", "mark_busy", "reasons", "shares_now"]

ADVICE = (
    "other work disturbed the rows marked busy: end other programs, or wait until they are done, and measure again; "
    "--compare does not count such rows"
)
_MOST_MOVED = 1.1  # of the control task, as a multiple of its quickest
_MOST_TAKEN = 0.1  # of the time of the cores
_LEAST_WATCHED = 0.5  # seconds of all cores together: the system counts in hundredths of a second
_SIZES = {"cpu": 1024, "cuda": 8192}  # of the control task's matrices
_REPEATS = 5


class CoreTimes(NamedTuple):
    """Seconds since the start of the machine, summed over the cores that this process may run on."""

    total: float
    used: float  # by any process
    stolen: float  # by a hypervisor


def core_times() -> CoreTimes | None:
    """The times so far; None where the system does not tell them."""
    import psutil

    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        cores = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)] or cores
    names = cores[0]._fields
    guests = ("guest", "guest_nice")  # which are in user and nice as well
    total = sum(getattr(core, name) for core in cores for name in names if name not in guests)
    idle = sum(getattr(core, name) for core in cores for name in ("idle", "iowait") if name in names)
    stolen = sum(core.steal for core in cores) if "steal" in names else 0.0
    return CoreTimes(total, total - idle - stolen, stolen) if total else None


class Watch:
    """Counts from its making on. This process's own time is not that of others."""

    def __init__(
        self, times: Callable[[], CoreTimes | None] = core_times, own: Callable[[], float] = time.process_time
    ) -> None:
        self._times, self._own = times, own
        self._start, self._own_start = times(), own()

    def shares(self) -> dict[str, float]:
        """Shares of the cores' time that others took and that was stolen; nothing after too short a time."""
        end, own = self._times(), self._own() - self._own_start
        if end is None or self._start is None or end.total - self._start.total < _LEAST_WATCHED:
            return {}
        total, used, stolen = (after - before for after, before in zip(end, self._start, strict=True))
        others = max(0.0, used - own)
        return {"other_cpu_share": round(others / total, 3), "stolen_share": round(stolen / total, 3)}


def shares_now(seconds: float = 0.6) -> dict[str, float]:
    """The shares while this process sleeps."""
    watch = Watch()
    time.sleep(seconds)
    return watch.shares()


def control_seconds(device: str) -> float:
    """The time of the control task: the median of some matrix products."""
    size = _SIZES[device]
    left, right = (torch.rand(size, size, dtype=_DTYPES[device], device=device) for _ in range(2))
    product = torch.mm(left, right)
    seconds = []
    for turn in range(-1, _REPEATS):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def mark_busy(results: Sequence[Result]) -> None:
    """Set ``"busy"`` in each result whose signs were looked at: the reasons, or None.

    >>> rows = [{"control_seconds": [0.02, 0.021]}, {"control_seconds": [0.02, 0.03]}, {}]
    >>> mark_busy(rows)
    >>> [row.get("busy") for row in rows]
    [None, 'control 1.5x', None]
    """
    quickest = min((seconds for row in results for seconds in row.get("control_seconds", ())), default=None)
    for row in results:
        if quickest is not None and row.get("control_seconds"):
            row["control_to_quickest"] = round(max(row["control_seconds"]) / quickest, 3)
        if "control_to_quickest" in row or "other_cpu_share" in row:
            row[BUSY] = ", ".join(reasons(row)) or None


def reasons(signs: Result) -> list[str]:
    """What says that other work disturbed a measurement, in a few words each.

    >>> reasons({"control_to_quickest": 1.05, "other_cpu_share": 0.38, "stolen_share": 0.01})
    ['others took 38%']
    """
    moved, taken, stolen = (
        signs.get(name) or 0.0 for name in ("control_to_quickest", "other_cpu_share", "stolen_share")
    )
    found = {
        f"control {moved:.2g}x": moved > _MOST_MOVED,
        f"others took {taken:.0%}": taken > _MOST_TAKEN,
        f"{stolen:.0%} stolen": stolen > _MOST_TAKEN,
    }
    return [reason for reason, holds in found.items() if holds]
