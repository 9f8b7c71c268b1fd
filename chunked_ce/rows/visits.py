"""Rows of logits visited a few at a time, while they are in cache, by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from chunked_ce.rows import threads
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.logits import Logits
from chunked_ce.rows.sizes import rows_of_visit, work_dtype
from chunked_ce.rows.statistics import PerRow
from chunked_ce.rows.teacher import Pair

__all__ = ["Visit", "visit_rows"]


class Visit(NamedTuple):
    """A few rows of logits."""

    rows: slice
    z: Tensor  # (r, V) in the work dtype, to be overwritten
    pair: Pair | None  # with the teacher's logits
    columns: ColumnSums | None  # of the thread


def visit_rows(
    work: Callable[[Visit], None],
    products: Tensor,  # (n, V)
    logits: Logits,
    per_row: PerRow,
    pairs: Callable[[], Callable[[slice], Pair | None]],  # gives a thread the pair of each few rows
    *,
    overwrite: bool,
    columns: ColumnSums | None = None,
) -> None:
    """Call ``work`` with a few rows at a time; logits are in the products' own memory if possible.

    Which rows meet in a visit does not depend on the number of threads, and neither do the bits of what it computes;
    those of ``columns`` do, since each thread adds up sums of its own over consecutive rows.
    """
    n, vocab_size = products.shape
    step, dtype = rows_of_visit(vocab_size, products.device.type), work_dtype(products.dtype)
    visits = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    count = min(threads.num_threads(products), len(visits))
    parts: list[tuple[list[slice], ColumnSums | None]] = [([rows], columns) for rows in visits]
    sums: list[ColumnSums] = []  # of each thread
    if columns is not None and count > 1:
        sums = [columns.empty() for _ in range(count)]
        ends = [at * len(visits) // count for at in range(count + 1)]
        parts = [(visits[start:end], own) for start, end, own in zip(ends, ends[1:], sums, strict=False)]

    def in_thread(taken: Iterable[tuple[list[slice], ColumnSums | None]]) -> None:
        scratch, pair_of = None, pairs()
        if not overwrite or products.dtype != dtype:
            scratch = products.new_empty(min(step, n), vocab_size, dtype=dtype)
        for part, own in taken:
            for rows in part:
                z = products[rows] if scratch is None else scratch[: rows.stop - rows.start].copy_(products[rows])
                logits.apply_(z, None if per_row.temperature is None else per_row.temperature[rows])
                work(Visit(rows, z, pair_of(rows), own))

    threads.share(parts, in_thread, count)
    if columns is not None:
        columns.merge(sums)
