"""Milliseconds and peak memory on a device, and the shapes that are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from chunked_ce.cli import memory
from chunked_ce.cli.implementations import DEVICE

__all__ = ["DEVICE", "ON_GPU", "SHAPES", "TINY", "Shape", "milliseconds", "peak_mib"]

ON_GPU = DEVICE == "cuda"


class Shape(NamedTuple):
    """N, D and V of a loss."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def floor(self) -> int:
        """The operations that no exact loss can do without: three products."""
        return 6 * self.tokens * self.hidden * self.vocab


SHAPES = (
    Shape(8192, 2304, 256000),  # Gemma-2 2B
    Shape(8192, 4096, 128256),  # Llama-3 8B
    Shape(8192, 4096, 151936),  # Qwen-3 8B
    Shape(16384, 2048, 248320),
    Shape(8192, 2048, 50257),  # a vocabulary that is no multiple of anything
)
TINY = (Shape(48, 16, 301),)


def milliseconds(work: Callable[[], object], rounds: int = 5, warm: int = 2) -> float:
    """The median over ``rounds``, by events on a GPU."""
    for _ in range(warm if ON_GPU else 1):
        work()
    times = sorted(_once(work) for _ in range(rounds if ON_GPU else 1))
    return float(f"{times[len(times) // 2]:.5g}")


def _once(work: Callable[[], object]) -> float:
    if not ON_GPU:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(work: Callable[[], object]) -> float | None:
    """Run ``work()``: MiB in torch's allocator at its peak, above those before; None on a CPU."""
    if not ON_GPU:
        work()
        return None
    return round(memory.peak_of(work, DEVICE) / 2**20, 1)
