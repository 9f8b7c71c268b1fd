"""Whole tensors for state dicts: gathered when they are asked for, or before, so that one rank can save alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from chunked_ce.sharded.rows import RowSharding, rows_in

__all__ = ["gathered", "whole_of"]

_before = threading.local()  # whole tensors by the id of the rows that they were gathered from


def whole_of(rows: Tensor, sharding: RowSharding, what: str) -> Tensor | None:
    """The rows of all ranks, which all of them ask for together unless they are inside of `gathered`; None on a rank
    that does not keep them there."""
    known: dict[int, Tensor | None] = getattr(_before, "whole", {})
    return known[id(rows)] if id(rows) in known else sharding.whole(rows, what)


@contextlib.contextmanager
def gathered(
    model: nn.Module, states: Iterable[tuple[str, Tensor, RowSharding]] = (), *, keep: bool = True
) -> Iterator[None]:
    """Gather sharded parameters and ``states`` of optimizers on the CPU of the ranks that ``keep`` them.

    Every rank enters it; inside, state dicts need no other rank.
    """
    outer: dict[int, Tensor | None] = getattr(_before, "whole", {})
    whole = dict(outer)
    for module in model.modules():
        for name, parameter, sharding in rows_in(module):
            _add(whole, parameter, sharding, name, keep)
    for name, rows, sharding in states:
        _add(whole, rows, sharding, name, keep)
    _before.whole = whole
    try:
        yield
    finally:
        _before.whole = outer


def _add(whole: dict[int, Tensor | None], rows: Tensor, sharding: RowSharding, name: str, keep: bool) -> None:
    if id(rows) not in whole:
        whole[id(rows)] = sharding.whole(rows, f"the whole of {name} for a checkpoint", device="cpu", keep=keep)
