"""What the code relies on in torch that no CPU can answer: each row says whether it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.device.jobs import Job, Row
from benchmarks.device.timing import DEVICE, ON_GPU, Shape, milliseconds, peak_mib
from chunked_ce import devices
from chunked_ce.cli.accuracy import relative_error
from chunked_ce.engine.scratch import logits_scratch

__all__ = ["jobs"]

_SUMMED, _ROUNDED = 1e-4, 1e-2  # errors of a product that stays in fp32, and of one that is rounded to bf16
_WIDE = torch.float32


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("products", _products), Job("copies", _copies)]


def _products(item: None) -> Iterator[Row]:
    """Factors with padded rows and sizes that no tile divides."""
    n, v, d = (2731, 50257, 2304) if ON_GPU else (27, 301, 16)
    x, weight = _normal(n, d), _normal(v, d)
    logits = logits_scratch(n, v, dtype=torch.bfloat16, device=torch.device(DEVICE))
    exact = x.double() @ weight.double().t()
    yield _row("mm into padded rows", lambda: torch.mm(x, weight.t(), out=logits), exact, _ROUNDED)
    bias = _normal(v)
    yield _row(
        "addmm of a bias into padded rows",
        lambda: torch.addmm(bias, x, weight.t(), out=logits),
        exact + bias.double(),
        _ROUNDED,
    )
    yield _with_dense_bias(x, weight, bias)
    torch.mm(x, weight.t(), out=logits)
    exact = logits.double()
    hidden_exact, head_exact = exact @ weight.double(), exact.t() @ x.double()
    del exact
    hidden = torch.empty_like(x)
    yield _row("mm of padded rows", lambda: torch.mm(logits, weight, out=hidden), hidden_exact, _ROUNDED)
    if not devices.adds_in_product(DEVICE, _WIDE, x.dtype):
        yield {"what": "products of bf16 with fp32 output", "skipped": f"none on {DEVICE}"}
        return
    wide, left = torch.empty(v, d, device=DEVICE), logits.t()
    yield _row(
        "mm with fp32 output, of padded rows transposed",
        lambda: torch.mm(left, x, out_dtype=_WIDE, out=wide),
        head_exact,
        _SUMMED,
    )
    first = wide.clone()
    again = torch.mm(left, x, out_dtype=_WIDE)
    yield {"what": "two products give the same bits", "ok": torch.equal(first, again)}
    del again
    peak = peak_mib(lambda: torch.addmm(wide, left, x, out_dtype=_WIDE, out=wide))
    error = relative_error(wide, 2 * head_exact)
    yield {
        "what": "addmm adds into its out",
        "ok": error < _SUMMED and (peak or 0) < 64,
        "difference": error,
        "peak_mib": peak,
    }
    wide_logits = logits_scratch(n, v, dtype=_WIDE, device=torch.device(DEVICE))
    exact = x.double() @ weight.double().t()
    yield _row(
        "mm with fp32 output into padded rows",
        lambda: torch.mm(x, weight.t(), out_dtype=_WIDE, out=wide_logits),
        exact,
        _SUMMED,
    )
    few = _normal(16, v)
    yield _row(
        "mm with fp32 output, of few rows and a long sum",
        lambda: torch.mm(few, weight, out_dtype=_WIDE),
        few.double() @ weight.double(),
        _SUMMED,
    )


def _with_dense_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Row:
    """The same product with its padding: the bias should then cost nothing."""
    entries = devices.padded_row(len(weight))
    weight, bias = (torch.cat([part, part.new_zeros(entries - len(part), *part.shape[1:])]) for part in (weight, bias))
    out = x.new_empty(len(x), entries)
    exact = x.double() @ weight.double().t() + bias.double()
    return _row("addmm of a bias into dense rows", lambda: torch.addmm(bias, x, weight.t(), out=out), exact, _ROUNDED)


def _row(what: str, product: Callable[[], Tensor], exact: Tensor, most: float) -> Row:
    """Whether a product is right, how long it takes, and what it allocates."""
    error, peak = relative_error(product(), exact), peak_mib(product)
    return {"what": what, "ok": error < most, "difference": error, "ms": milliseconds(product), "peak_mib": peak}


def _copies(item: None) -> Iterator[Row]:
    """A copy into pinned memory does not make the host wait, and an event tells when it is there."""
    if not ON_GPU:
        yield {"what": "copies into pinned memory", "skipped": f"none on {DEVICE}"}
        return
    n = 8192
    a = _normal(n, n)
    product = torch.empty_like(a)
    numbers = torch.arange(64, device=DEVICE)
    pinned = torch.zeros(64, dtype=numbers.dtype).pin_memory()
    ready = torch.cuda.Event()
    pinned.copy_(numbers, non_blocking=True)
    torch.cuda.synchronize()
    busy = milliseconds(lambda: torch.mm(a, a, out=product))
    pinned.zero_()
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a, out=product)
    pinned.copy_(numbers, non_blocking=True)
    ready.record()
    host = 1e3 * (time.perf_counter() - start)
    ready.synchronize()
    right = pinned.tolist() == list(range(64))
    yield {"what": "a copy to pinned memory is queued", "ok": right and host < 3 * busy, "ms": host, "product_ms": busy}
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a, out=product)
    numbers[:1].tolist()
    host = 1e3 * (time.perf_counter() - start)
    yield {"what": "reading a number waits", "ok": host > 5 * busy, "ms": host, "product_ms": busy}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)
