"""The loops of `chunked_ce.engine.sharded` on ranks that fail alone: all ranks fail, and are in step afterwards.

A rank that runs out of memory in a chunk, or finds a bad target, would leave the others waiting in a collective, and
its next call would be read as the rest of this one. So it goes through with what is left of the call's collectives,
giving NaN for what it has not, and raises then. On the CPU the ranks tell each other at the end whether they got
through, and the others raise too, with the name of the rank that failed and what it said. On an accelerator that would
be a wait of the host: there the others get NaN.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.distributed.collectives import Collectives
from chunked_ce.engine import sharded
from chunked_ce.engine.backprop import Gradients
from chunked_ce.engine.counted import drops_ignored
from chunked_ce.engine.linear import Head, Settings
from chunked_ce.engine.rows import Wanted, work_dtype
from chunked_ce.engine.sharded import Shard
from chunked_ce.objective import RowStatistics

__all__ = ["gradients", "logits_statistics", "loss_and_gradients", "statistics"]

_Found = TypeVar("_Found")


class _Step(NamedTuple):
    """A collective of a call, and what each rank puts in."""

    kind: str  # a method of `Collectives`
    what: str  # as errors name it
    shape: tuple[int, int]
    dtype: torch.dtype


def statistics(hidden: Tensor, head: Head, target: Tensor, ignore_index: int, wanted: Wanted, *rest) -> RowStatistics:
    """`sharded.statistics`."""
    settings, shard = rest

    def steps() -> Iterator[_Step]:
        chunks = _Chunks(hidden, head, target, ignore_index, settings, shard, sums_head=_is_sequence(shard))
        return chunks.steps(wanted=wanted)

    return _together(steps, shard, hidden, sharded.statistics, hidden, head, target, ignore_index, wanted, *rest)


def loss_and_gradients(
    hidden: Tensor, head: Head, target: Tensor, *rest
) -> tuple[Tensor, Gradients, Tensor | None, RowStatistics]:
    """`sharded.loss_and_gradients`."""
    *_, ignore_index, wanted, needed, settings, shard = rest

    def steps() -> Iterator[_Step]:
        chunks = _Chunks(hidden, head, target, ignore_index, settings, shard, sums_head=needed[1])
        return chunks.steps(wanted=wanted, reduces=needed[0])

    return _together(steps, shard, hidden, sharded.loss_and_gradients, hidden, head, target, *rest)


def gradients(hidden: Tensor, head: Head, target: Tensor, *rest, weight_sum: Tensor | None = None) -> Gradients:
    """`sharded.gradients`."""
    *_, ignore_index, needed, settings, shard = rest

    def steps() -> Iterator[_Step]:
        if _is_sequence(shard):
            chunks = _Chunks(hidden, head, target, ignore_index, settings, shard, sums_head=True)
            return chunks.steps(reduces=needed[0])
        return iter(
            [_Step("all_reduce_", sharded.HIDDEN_GRADIENT, hidden.shape, sharded.reduce_dtype(shard, settings))]
        )

    arguments = (hidden, head, target, *rest, weight_sum)
    if not _is_sequence(shard) and (shard.input_grad == "partial" or not needed[0]):
        return sharded.gradients(*arguments)  # no collective: each rank's affair, and it need not come together
    return _together(steps, shard, hidden, sharded.gradients, *arguments)


def logits_statistics(products: Tensor, target: Tensor, *rest) -> RowStatistics:
    """`sharded.logits_statistics`."""
    *_, ignore_index, wanted, _, shard = rest

    def steps() -> Iterator[_Step]:
        shape = _moved(target, ignore_index, [len(target)])[0], _columns(wanted)
        return iter([_Step("all_gather", sharded.STATISTICS, shape, work_dtype(products.dtype))])

    return _together(steps, shard, products, sharded.logits_statistics, products, target, *rest)


class _Chunks:
    """The chunks of a call as `sharded` makes them, known from the targets and the plan alone."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target: Tensor,
        ignore_index: int,
        settings: Settings,
        shard: Shard,
        *,
        sums_head: bool,
    ) -> None:
        self._width, self._settings, self._shard = hidden.shape[1], settings, shard
        self._ranks = Collectives(shard.group_name).size
        shape, keywords = shard.planned(len(target), head.weight, settings, sums_head=sums_head)
        size = plan.tokens_per_chunk(*shape, **keywords)
        if _is_sequence(shard):
            windows = target.view(self._ranks, -1).split(max(1, size // self._ranks), dim=1)
            target = torch.cat([window.flatten() for window in windows])
            self._tokens = [window.numel() for window in windows if window.numel()]
            self._rows = _moved(target, ignore_index, self._tokens)
        else:
            (counted,) = _moved(target, ignore_index, [len(target)])
            self._rows = self._tokens = [min(size, counted - at) for at in range(0, counted, size)]

    def steps(self, *, wanted: Wanted | None = None, reduces: bool = False) -> Iterator[_Step]:
        """The collectives in their order: of hidden states a chunk ahead, of their gradients a chunk behind that of
        the statistics, if any are ``wanted``."""
        reduces = reduces and self._shard.input_grad != "partial"
        last = len(self._rows) - 1
        behind = wanted is not None
        if last >= 0 and _is_sequence(self._shard):
            yield self._hidden(0)
        for at in range(last + 1):
            if at < last and _is_sequence(self._shard):
                yield self._hidden(at + 1)
            if wanted is not None:
                shape = self._rows[at], _columns(wanted)
                yield _Step("all_gather", sharded.STATISTICS, shape, work_dtype(self._settings.compute_dtype))
            if reduces and at >= behind:
                yield self._reduction(at - behind)
        if reduces and behind and last >= 0:
            yield self._reduction(last)

    def _hidden(self, at: int) -> _Step:
        shape = self._tokens[at] // self._ranks, self._width
        return _Step("all_gather", sharded.HIDDEN, shape, self._settings.compute_dtype)

    def _reduction(self, at: int) -> _Step:
        kind = "reduce_scatter" if _is_sequence(self._shard) else "all_reduce_"
        dtype = sharded.reduce_dtype(self._shard, self._settings)
        return _Step(kind, sharded.HIDDEN_GRADIENT, (self._tokens[at], self._width), dtype)


def _moved(target: Tensor, ignore_index: int, sizes: list[int]) -> list[int]:
    """How many of each chunk's tokens have statistics: those that count, or all where none is dropped."""
    if not drops_ignored(target.device):
        return sizes
    return [int((chunk != ignore_index).sum()) for chunk in target.split(sizes)]


def _columns(wanted: Wanted) -> int:
    return 3 + 2 * wanted.weighted + wanted.mean + wanted.correct


def _is_sequence(shard: Shard) -> bool:
    return shard.input_grad == "sequence"


def _together(
    steps: Callable[[], Iterator[_Step]], shard: Shard, like: Tensor, work: Callable[..., _Found], *arguments
) -> _Found:
    """``work(*arguments)``, whose collectives are ``steps``; an error on one rank is one on every rank."""
    collectives = Collectives(shard.group_name)
    found = failure = None
    with Collectives.counted() as issued:
        try:
            found = work(*arguments)
        except Exception as error:
            if issued.broken:
                raise  # the others are lost
            failure = error
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # which hold what the memory ran out for
            _go_through(itertools.islice(steps(), issued.number, None), collectives, like)
    if like.device.type == "cpu" and collectives.size > 1:
        _raise_together(failure, collectives)
    if failure is not None:
        raise failure
    return found


def _go_through(steps: Iterator[_Step], collectives: Collectives, like: Tensor) -> None:
    for kind, what, shape, dtype in steps:
        getattr(collectives, kind)(like.new_full(shape, torch.nan, dtype=dtype), what).wait()


def _raise_together(failure: Exception | None, collectives: Collectives) -> None:
    """Raise on every rank if one failed: its own error, or one that names a rank and what it said."""
    if not collectives.any_failed(failure is not None):
        return
    said = collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    rank, what = next((rank, what) for rank, what in enumerate(said) if what is not None)
    raise RuntimeError(f"vocab: rank {rank} of the group failed in this call, and all ranks with it: {what}")
