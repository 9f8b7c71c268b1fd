"""Counts the collectives that this process, or each thread of it, starts."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

__all__ = ["GATHER", "REDUCE", "SCATTER", "SINGLE", "Collective", "counted", "sent_bytes"]

# The position of the tensor that a rank puts in. Torch's old names of the last two call the new ones.
SINGLE = hasattr(dist, "all_gather_single")
GATHER, REDUCE, SCATTER = (
    "all_gather_single" if SINGLE else "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter_single" if SINGLE else "reduce_scatter_tensor",
)
_PUT_IN = {
    "all_gather": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "reduce_scatter": 1,
    GATHER: 1,
    REDUCE: 0,
    SCATTER: 1,
}


class Collective(NamedTuple):
    name: str
    bytes: int  # that this rank puts in


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], list[Collective]]]:
    """`with counted() as collectives:` makes `collectives()` those that the calling thread has started in it."""
    by_thread: dict[int, list[Collective]] = {}

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(collective)
        put_in = list(signature.parameters)[_PUT_IN[name]]

        @functools.wraps(collective)
        def started(*args: Any, **keywords: Any) -> Any:
            tensors = signature.bind(*args, **keywords).arguments[put_in]
            size = sum(t.numel() * t.element_size() for t in (tensors if isinstance(tensors, list) else [tensors]))
            by_thread.setdefault(threading.get_ident(), []).append(Collective(name, size))
            return collective(*args, **keywords)

        return started

    originals = {name: getattr(c10d, name) for name in _PUT_IN}
    for name, original in originals.items():
        for module in (dist, c10d):
            setattr(module, name, counting(name, original))
    try:
        yield lambda: by_thread.get(threading.get_ident(), [])
    finally:
        for name, original in originals.items():
            for module in (dist, c10d):
                setattr(module, name, original)


def sent_bytes(collectives: Sequence[Collective], ranks: int) -> int:
    """What a rank sends, where collectives go round a ring: of all that it puts into an all-gather R - 1 times as much,
    of a reduce-scatter or an all-to-all the part (R - 1) / R, and of an all-reduce twice that part."""
    part = (ranks - 1) / ranks
    shares = {GATHER: ranks - 1, SCATTER: part, "all_to_all_single": part, REDUCE: 2 * part}
    return round(sum(shares[one.name] * one.bytes for one in collectives if one.name in shares))
