"""The sweep on ranks that may fail alone: when one fails, all ranks fail, and they stay in step.

A rank that runs out of memory in a chunk, or finds a bad target, would leave the others waiting in a collective, and
they would take its next call for the rest of this one. So it first issues the remaining collectives of the call, with
NaN for the values that it lacks, and then raises. On the CPU the ranks exchange at the end whether they succeeded, and
the others raise too, naming the rank that failed and its message. On an accelerator the host would have to wait for
this: there the others get NaN.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from chunked_ce.engine import gathered, sweep
from chunked_ce.engine.call import Call
from chunked_ce.engine.ranks import HIDDEN_GRADIENT, STATISTICS
from chunked_ce.engine.sources import HIDDEN
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.rows.statistics import RowStatistics, num_columns, passes_of, work_dtype

__all__ = ["gathered_gradients", "gathered_logits", "gradients", "loss_and_gradients", "statistics"]

_Result = TypeVar("_Result")


class _Step(NamedTuple):
    """A collective of a call, and the tensor that each rank contributes."""

    kind: str  # a method of `Collectives`
    what: str  # as errors name it
    shape: tuple[int, int]
    dtype: torch.dtype


def statistics(call: Call) -> RowStatistics:
    """`sweep.statistics`."""
    return _together(lambda: _Chunks(call).steps(combines=True), call, sweep.statistics, call)


def loss_and_gradients(call: Call) -> tuple[Tensor, list[Tensor | None], Tensor | None, RowStatistics]:
    """`sweep.loss_and_gradients`."""

    def steps() -> Iterator[_Step]:
        return _Chunks(call).steps(combines=True, reduces=True)

    return _together(steps, call, sweep.loss_and_gradients, call)


def gradients(
    call: Call, known: RowStatistics, slopes: RowStatistics, weight_sum: Tensor | None = None
) -> list[Tensor | None]:
    """`sweep.gradients`."""
    return _reducing(call, sweep.gradients, call, known, slopes, weight_sum)


def gathered_logits(call: Call) -> Tensor:
    """`gathered.logits`."""

    def steps() -> Iterator[_Step]:
        yield from _Chunks(call).steps()
        num_ids = sum(ids.shape[1] for ids in call.per_token.values())
        shape, dtype = (len(call.target), num_ids), work_dtype(call.specification.settings.compute_dtype)
        yield _Step("all_reduce_", gathered.GATHERED, shape, dtype)

    return _together(steps, call, gathered.logits, call)


def gathered_gradients(call: Call, upstream: Tensor) -> list[Tensor | None]:
    """`gathered.gradients`."""
    return _reducing(call, gathered.gradients, call, upstream)


def _reducing(call: Call, work: Callable[..., _Result], *arguments) -> _Result:
    """``work(*arguments)`` of a backward, whose collectives sum the gradient of the hidden states."""
    widths = call.chunk_widths(needed=True) if call.specification.shard.input_grad != "partial" else []
    if not (widths or call.is_sequence):
        return work(*arguments)  # no collective: a rank that fails holds up no other

    def steps() -> Iterator[_Step]:
        if call.cuts_tokens:
            return _Chunks(call).steps(reduces=True)
        shapes = [(len(call.target), width) for width in widths]
        return iter([_Step("all_reduce_", HIDDEN_GRADIENT, shape, call.reduce_dtype()) for shape in shapes])

    return _together(steps, call, work, *arguments)


class _Chunks:
    """The chunks of a call as its source makes them, derived from the targets and the plan alone."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ranks = Collectives(call.specification.shard.group_name).size
        self._reduced = sum(call.chunk_widths(needed=True))  # columns of the gradients of hidden states
        target, num_tokens = call.target, len(call.target)
        if not call.is_head:
            self._rows = self._num_moved(target, [num_tokens])
            return
        size = call.plan_by_tokens(num_tokens, sums_head=call.sums_head).tokens
        if call.is_sequence:
            windows = target.view(self._ranks, -1).split(max(1, size // self._ranks), dim=1)
            target = torch.cat([window.flatten() for window in windows])
            self._tokens = [window.numel() for window in windows if window.numel()]
            self._rows = self._num_moved(target, self._tokens)
        else:
            (counted,) = self._num_moved(target, [num_tokens])
            self._rows = self._tokens = [min(size, counted - at) for at in range(0, counted, size)]

    def _num_moved(self, target: Tensor, sizes: list[int]) -> list[int]:
        """How many of each chunk's tokens have statistics: those that count, or all where none is dropped."""
        if self._call.specification.settings.ignored != "drop":
            return sizes
        return [int((chunk != self._call.ignore_index).sum()) for chunk in target.split(sizes)]

    def steps(self, *, combines: bool = False, reduces: bool = False) -> Iterator[_Step]:
        """The collectives in order: hidden states are gathered a chunk ahead, and their gradients, if needed, are
        reduced a chunk behind the statistics, if these are combined."""
        reduces = reduces and self._reduced > 0 and self._call.specification.shard.input_grad != "partial"
        last = len(self._rows) - 1
        if last >= 0 and self._call.is_sequence:
            yield self._hidden(0)
        for at in range(last + 1):
            if at < last and self._call.is_sequence:
                yield self._hidden(at + 1)
            if combines:
                yield self._statistics(at, 0)
            if at >= combines:
                yield from self._finishing(at - combines, combines, reduces)
        if combines and last >= 0:
            yield from self._finishing(last, combines, reduces)

    def _finishing(self, at: int, combines: bool, reduces: bool) -> Iterator[_Step]:
        """The collectives of a chunk once its first statistics have come."""
        if combines and passes_of(self._call.specification.names)[1]:
            yield self._statistics(at, 1)
        if reduces:
            yield self._reduction(at)

    def _statistics(self, at: int, turn: int) -> _Step:
        specification = self._call.specification
        names = passes_of(specification.names)[turn]
        shape = self._rows[at], num_columns(names, self._call.num_ids)
        return _Step("all_gather", STATISTICS, shape, work_dtype(specification.settings.compute_dtype))

    def _hidden(self, at: int) -> _Step:
        shape = self._tokens[at] // self._ranks, sum(self._call.chunk_widths())
        return _Step("all_gather", HIDDEN, shape, self._call.specification.settings.compute_dtype)

    def _reduction(self, at: int) -> _Step:
        kind = "reduce_scatter" if self._call.is_sequence else "all_reduce_"
        shape = self._tokens[at], self._reduced
        return _Step(kind, HIDDEN_GRADIENT, shape, self._call.reduce_dtype())


def _together(steps: Callable[[], Iterator[_Step]], call: Call, work: Callable[..., _Result], *arguments) -> _Result:
    """``work(*arguments)``, whose collectives are ``steps``; an error on one rank is raised on every rank."""
    collectives = Collectives(call.specification.shard.group_name)
    result = failure = None
    like = call.tensors[0]
    with Collectives.counted() as issued:
        try:
            result = work(*arguments)
        except Exception as error:
            if issued.broken:
                raise  # the other ranks cannot be reached
            failure = error
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # frames hold the tensors that filled the memory
            _go_through(itertools.islice(steps(), issued.number, None), collectives, like)
    if like.device.type == "cpu" and collectives.size > 1:
        _raise_together(failure, collectives)
    if failure is not None:
        raise failure
    return result


def _go_through(steps: Iterator[_Step], collectives: Collectives, like: Tensor) -> None:
    for kind, what, shape, dtype in steps:
        getattr(collectives, kind)(like.new_full(shape, torch.nan, dtype=dtype), what).wait()


def _raise_together(failure: Exception | None, collectives: Collectives) -> None:
    """Raise on every rank if one failed: its own error, or one that names a failed rank and its message."""
    if not collectives.any_failed(failure is not None):
        return
    messages = collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise RuntimeError(f"vocab: rank {rank} of the group failed in this call, and all ranks with it: {message}")
