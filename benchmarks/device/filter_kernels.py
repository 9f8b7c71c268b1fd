"""The passes of the gradient filter on one chunk, with the bytes that each has to move."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import torch

from benchmarks.device.jobs import Job, Row
from benchmarks.device.kernels import RowInputs
from benchmarks.device.timing import DEVICE, Shape, milliseconds
from benchmarks.roofline import chunk_tokens
from chunked_ce.plan import GROUPS, KEPT_SHARE
from chunked_ce.rows import torch_filter, torch_rows

__all__ = ["jobs"]

_BF16, _FP32 = 2, 4  # bytes
_SCALE = 2.0**8


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("filter", _passes, (shape,)) for shape in shapes]


def _passes(shape: Shape) -> Iterator[Row]:
    """As many columns are kept as `chunked_ce.plan` expects of a trained model."""
    v, d = shape.vocab, shape.hidden
    rows = RowInputs.random(chunk_tokens(shape, DEVICE), v)
    kernels = torch_filter
    if rows.kernels is not torch_rows:
        kernels = importlib.import_module("chunked_ce.rows.triton_filter")
    n, count = len(rows.target), math.ceil(KEPT_SHARE * v)
    width = torch_filter.padded(count + 3 * GROUPS)
    weight = torch.randn(v, d, device=DEVICE).mul_(0.02).bfloat16()
    place = _places(v, count)
    skip = torch.zeros((), dtype=torch.int32, device=DEVICE)
    right, tail = torch.rand(v, GROUPS, device=DEVICE) / v, torch.randn(GROUPS, d, device=DEVICE)
    parts = torch.randn(count, d, device=DEVICE)
    out = torch.empty_like(weight)
    passes: dict[str, tuple[int, Callable[[], object]]] = {
        "compact_at": (
            rows.bytes + n * width * _BF16,
            lambda: kernels.compact_at(rows.logits, place, skip, GROUPS, width),
        ),
        "summed_tail": (v * d * _BF16, lambda: kernels.summed_tail(right, weight, skip)),
        "head_rows": (
            (count + width) * d * _BF16,
            lambda: kernels.head_rows(weight, place, tail, count, width, _SCALE),
        ),
        "finished": (
            v * d * _BF16 + count * d * _FP32,
            lambda: kernels.finished(out, None, parts, place.unsqueeze(0), right, tail),
        ),
    }
    for name, (size, work) in passes.items():
        yield {"what": name, "rows": f"{n} rows", "kept": count, "bytes": size, "ms": milliseconds(work, 7)}


def _places(vocab: int, count: int) -> torch.Tensor:
    """(V,) int32: the kept columns in their order, the others in groups."""
    kept = torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    kept[torch.randperm(vocab, device=DEVICE)[:count]] = True
    groups = torch.arange(vocab, device=DEVICE, dtype=torch.int32) % GROUPS
    return torch.where(kept, kept.cumsum(0, dtype=torch.int32) - 1, -1 - groups)
