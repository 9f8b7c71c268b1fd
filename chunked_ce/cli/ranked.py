"""Numbers that the ranks of a measurement combine; a process without a group is a measurement of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

__all__ = ["Taken", "is_group", "largest", "size", "slowest", "together", "total"]


class Taken(NamedTuple):
    """Seconds of the slowest rank."""

    wall: float
    processor: float  # of processor time, whoever else was on the machine


def is_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if is_group() else 1


def together() -> None:
    """Wait until all ranks are here."""
    if is_group():
        dist.barrier()


def slowest(step: Callable[[], None]) -> Taken:
    """The time of a step that the ranks begin together."""
    together()
    start = time.perf_counter(), time.process_time()
    step()
    return Taken(*largest(time.perf_counter() - start[0], time.process_time() - start[1]))


def largest(*numbers: float) -> list[float]:
    """Each number's maximum over the ranks."""
    return _reduced(numbers, ReduceOp.MAX)


def total(number: float) -> float:
    """The sum over the ranks."""
    return _reduced((number,), ReduceOp.SUM)[0]


def _reduced(numbers: tuple[float, ...], operation: ReduceOp.RedOpType) -> list[float]:
    if not is_group():
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    reduced = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, op=operation)
    values: list[float] = reduced.tolist()
    return values
