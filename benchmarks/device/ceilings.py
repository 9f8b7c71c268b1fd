"""What the device reaches by itself: copies, bf16 products, and the host's share of a call."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.device.jobs import Job, Row
from benchmarks.device.timing import DEVICE, ON_GPU, Shape, milliseconds

__all__ = ["BURST", "COPY", "jobs"]

BURST, COPY = "bf16 product, burst", "copy"  # rows that give the rates of everything after them


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("device", _ceilings)]


def _ceilings(item: None) -> Iterator[Row]:
    n = 8192 if ON_GPU else 64
    a, b = (torch.randn(n, n, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for what, rounds in ((BURST, 10), ("bf16 product, sustained", 300)):
        ms = milliseconds(lambda: torch.mm(a, b, out=out), rounds)
        yield {"what": what, "ms": ms, "operations": 2 * n**3, "n": n}
    source = torch.empty(2**31 if ON_GPU else 2**16, dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(source)
    yield {"what": COPY, "ms": milliseconds(lambda: into.copy_(source)), "bytes": 2 * len(source)}
    words = source.view(torch.int32)
    yield {"what": "read (amax)", "ms": milliseconds(lambda: words.amax()), "bytes": len(source)}
    yield {"what": "write (zero_)", "ms": milliseconds(lambda: words.zero_()), "bytes": len(source)}
    small = torch.zeros(1, device=DEVICE)
    yield {"what": "host: one small launch", "us": _host_microseconds(lambda: small.add_(1))}
    if ON_GPU:
        yield {"what": "host: free memory of the device", "us": _host_microseconds(torch.cuda.mem_get_info)}
        yield {"what": "host: waiting for an idle device", "us": _host_microseconds(torch.cuda.synchronize)}


def _host_microseconds(call) -> float:
    times = 100 if ON_GPU else 5
    call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return round(1e6 * (time.perf_counter() - start) / times, 2)
