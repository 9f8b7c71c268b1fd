"""What was chosen without a device: tokens in a chunk, and the blocks and warps of the row kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

from benchmarks.device.jobs import Job, Row
from benchmarks.device.kernels import RowInputs
from benchmarks.device.losses import Case, queued, step_of
from benchmarks.device.timing import ON_GPU, Shape, milliseconds, peak_mib
from benchmarks.device.ways import one_pass, two_passes
from chunked_ce import ChunkOptions, linear_cross_entropy
from chunked_ce.cli.implementations import FILTERED, FORWARD
from chunked_ce.rows.statistics import Logits

__all__ = ["jobs"]

_CHUNKS = (1024, 2048, 2816, 4096, 8192, 16384) if ON_GPU else (16, 48)
_BLOCKS = (1024, 2048, 4096, 8192, 16384)
_WARPS = (4, 8, 16, 32)
_PER_THREAD = (8, 32)  # logits in flight: fewer do not hide the latency of memory, more do not fit into registers


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    rows = [Shape(4096, 1, vocab) for vocab in (128256, 50257)] if ON_GPU else shapes[:1]
    chunks = [Job("chunks", _chunks, (shape,)) for shape in shapes[:2]]
    ways = [Job("ways", _ways, (shape,)) for shape in shapes]
    return [*ways, *chunks, *(Job("row kernels", _blocks, (shape,)) for shape in rows)]


def _ways(shape: Shape) -> Iterator[Row]:
    """The forward way with one pass over the logits and with two, and with ignored tokens masked."""
    whole = Case(shape).inputs()
    half = Case(shape, halved=True)
    masked = functools.partial(linear_cross_entropy, options=ChunkOptions(ignored="mask"))
    auto = functools.partial(linear_cross_entropy, options=ChunkOptions())
    for what, loss, way, inputs in (
        ("one pass", auto, one_pass, whole),
        ("two passes", auto, two_passes, whole),
        ("half ignored, dropped", auto, nullcontext, half.inputs(whole)),
        ("half ignored, masked", masked, nullcontext, half.inputs(whole)),
    ):
        with way():
            ms = milliseconds(lambda loss=loss, inputs=inputs: step_of(loss, inputs), 3)
        yield {"what": what, "ms": ms, "operations": shape.floor // (1 if inputs is whole else 2)}


def _chunks(shape: Shape) -> Iterator[Row]:
    inputs = Case(shape).inputs()
    for name in (FORWARD, FILTERED):
        for tokens in (tokens for tokens in _CHUNKS if tokens <= shape.tokens):
            step = lambda name=name, tokens=tokens: queued(name, inputs, tokens)  # noqa: E731
            ms = milliseconds(step, 3)
            row = {"what": name, "chunk": tokens, "ms": ms, "operations": shape.floor}
            yield row | {"peak_mib": peak_mib(step)}


def _blocks(shape: Shape) -> Iterator[Row]:
    """Statistics and gradients with other blocks than `triton_rows` chooses."""
    rows = RowInputs.random(shape.tokens, shape.vocab)
    if not hasattr(rows.kernels, "_block_of"):
        yield {"what": "blocks", "skipped": "these row kernels have no blocks"}
        return
    chosen = rows.kernels._block_of
    for block in _BLOCKS:
        for warps in _WARPS:
            if not _PER_THREAD[0] <= block // (32 * warps) <= _PER_THREAD[1]:
                continue
            rows.kernels._block_of = lambda *_, block=block, warps=warps: (block, warps)
            try:
                yield from _both(rows, {"block": block, "warps": warps})
            finally:
                rows.kernels._block_of = chosen


def _both(rows: RowInputs, row: Row) -> Iterator[Row]:
    try:
        known = rows.statistics()
        ms = milliseconds(rows.statistics)
        yield {"what": "statistics", "ms": ms, "bytes": rows.bytes} | row
        ms = milliseconds(lambda: rows.write_gradients(known, Logits()))
        yield {"what": "gradients", "ms": ms, "bytes": 2 * rows.bytes} | row
    except (RuntimeError, ValueError) as error:  # a block that takes too many registers
        yield row | {"what": "blocks", "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
