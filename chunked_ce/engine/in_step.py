"""The sweep on ranks that may fail alone: when one fails, all ranks fail, and they stay in step.

A rank that runs out of memory in a chunk, or finds a bad target, would leave the others waiting in a collective, and
they would take its next call for the rest of this one. So it first issues the remaining collectives of the call, with
NaN for the values that it lacks, and then raises. On the CPU the ranks exchange at the end whether they succeeded, and
the others raise too, naming the rank that failed and its message. On an accelerator the host would have to wait for
this: there the others get NaN.

All of this starts with a meeting (`chunked_ce.parallel.meeting`), in which ranks see that they work on the same call:
on the CPU always, on an accelerator where the host waits for numbers of tokens or for upstream gradients in any case.
"""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from chunked_ce.engine import gathered, sweep
from chunked_ce.engine.call import Call
from chunked_ce.engine.intentions import doing
from chunked_ce.engine.own_teacher import TEACHER, Columns
from chunked_ce.engine.ranks import HIDDEN_GRADIENT, STATISTICS
from chunked_ce.engine.sources import HIDDEN
from chunked_ce.engine.token_shards import TOKENS, JoinedCall, OwnTokens, joined_sequence, sequence_call
from chunked_ce.engine.windows import windows_of
from chunked_ce.narrowing import not_none
from chunked_ce.parallel import meeting
from chunked_ce.parallel.collectives import CollectiveError, Collectives
from chunked_ce.parallel.meeting import Doing
from chunked_ce.parallel.shard import Shard
from chunked_ce.rows.statistics import RowStatistics, num_columns, passes_of, work_dtype

__all__ = [
    "common_factor",
    "gathered_gradients",
    "gathered_logits",
    "gradients",
    "loss_and_gradients",
    "number_of_call",
    "statistics",
]

_Result = TypeVar("_Result")


class _Step(NamedTuple):
    """A collective of a call, and the tensor that each rank contributes."""

    kind: str  # a method of `Collectives`
    what: str  # as errors name it
    shape: tuple[int, ...]
    dtype: torch.dtype
    sizes: tuple[list[int], ...] = ()  # elements for each rank and from each, where they differ


def statistics(call: Call) -> RowStatistics:
    """`sweep.statistics`."""

    def work(joined: JoinedCall) -> RowStatistics:
        return joined.put_rows(sweep.statistics(joined.call))

    if call.is_sequence:
        return _with_tokens(call, None, lambda sized: _Chunks(sized).steps(combines=True), work)
    return _together(lambda: _Chunks(call).steps(combines=True), doing(call), call, sweep.statistics, call)


def loss_and_gradients(call: Call) -> sweep.LossAndGradients:
    """`sweep.loss_and_gradients`."""

    def steps(call: Call) -> Iterator[_Step]:
        return _Chunks(call).steps(combines=True, reduces=True)

    def work(joined: JoinedCall) -> sweep.LossAndGradients:
        loss, grads, targets, rows = sweep.loss_and_gradients(joined.call)
        return loss, grads, targets, joined.put_rows(rows)

    if call.is_sequence:
        return _with_tokens(call, None, steps, work)
    return _together(lambda: steps(call), doing(call), call, sweep.loss_and_gradients, call)


def gradients(
    call: Call, known: RowStatistics, slopes: RowStatistics, weight_sum: Tensor | None = None, number: int = 0
) -> list[Tensor | None]:
    """`sweep.gradients`, of the call with this ``number``; 0 if it is not known."""
    if not call.is_sequence:
        return _reducing(call, number, sweep.gradients, call, known, slopes, weight_sum)
    divides_slopes = call.specification.settings.accumulate_into is not None
    call, divisor = _averaging(call, divides_slopes=divides_slopes)

    def work(joined: JoinedCall) -> list[Tensor | None]:
        values = iter(joined.others)
        known_rows, slopes_rows = (rows.map(lambda _: next(values)) for rows in (known, slopes))
        return sweep.gradients(joined.call, known_rows, slopes_rows, weight_sum)

    given = *known.named().values(), *(slope / divisor for slope in slopes.named().values())
    return _with_tokens(call, number, lambda sized: _Chunks(sized).steps(reduces=True), work, *given)


def gathered_logits(call: Call) -> Tensor:
    """`gathered.logits`."""

    def steps(call: Call) -> Iterator[_Step]:
        yield from _Chunks(call).steps()
        num_ids = sum(ids.shape[1] for ids in call.per_token.values())
        shape = call.num_tokens, num_ids
        yield _Step("all_reduce_", gathered.GATHERED, shape, work_dtype(call.specification.settings.compute_dtype))

    if call.is_sequence:

        def work(joined: JoinedCall) -> Tensor:
            return joined.put(gathered.logits(joined.call))

        return _with_tokens(call, None, steps, work, ids=call.per_token)
    return _together(lambda: steps(call), doing(call), call, gathered.logits, call)


def gathered_gradients(call: Call, upstream: Tensor) -> list[Tensor | None]:
    """`gathered.gradients`."""
    if not call.is_sequence:
        return _reducing(call, 0, gathered.gradients, call, upstream)
    call, divisor = _averaging(call, divides_slopes=True)

    def work(joined: JoinedCall) -> list[Tensor | None]:
        return gathered.gradients(joined.call, *joined.others)

    steps, given = lambda sized: _Chunks(sized).steps(reduces=True), upstream / divisor
    return _with_tokens(call, 0, steps, work, given, ids=call.per_token)


def common_factor(call: Call, factor: Tensor, number: int, *, known: bool) -> bool:
    """Whether the loss of every rank has this upstream gradient, ``factor`` (), where ranks have tokens of their own,
    and the sums of gradients are ``known`` on every rank."""
    ranks = Collectives(not_none(call.specification.shard).group_name)
    intent = doing(call, number)
    intent = dataclasses.replace(intent, what=intent.what.replace("start", "exchange of upstream gradients"))
    bits = factor.detach().double().reshape(1).view(torch.int64)[0]
    found = meeting.meet(ranks, intent, bits, int(known), device=factor.device)
    factors = torch.tensor([bits for bits, *_ in found]).view(torch.float64)
    same = bool((factors == factors[0]).all() or factors.isnan().all())
    return same and all(known for _, known, *_ in found)


def number_of_call(shard: Shard | None) -> int:
    """The number of the last call that the ranks have started together, to which its backward belongs."""
    return 0 if shard is None else meeting.number_of_calls(Collectives(shard.group_name))


def _with_tokens(
    call: Call,
    number: int | None,  # of the call in whose backward this is; None in a forward
    steps: Callable[[Call], Iterator[_Step]],
    work: Callable[[JoinedCall], _Result],
    *others: Tensor,  # (N, ...) per token
    ids: Iterable[str] = (),
) -> _Result:
    """``work`` of the call over the tokens of all ranks, whose collectives are ``steps``, with ``others`` joined."""
    intent = doing(call, number, *others)
    if not not_none(call.specification.shard).is_own:
        return _together(lambda: steps(sequence_call(call)), intent, call, lambda: work(joined_sequence(call, *others)))
    named = ids if call.specification.ids is None else (call.specification.ids,)
    tokens = OwnTokens(call, intent, *others, ids=named)

    def all_steps() -> Iterator[_Step]:
        yield _Step("all_gather", TOKENS, tokens.shape, torch.uint8)
        yield from steps(tokens.call)

    return _together(all_steps, intent, call, lambda: work(tokens.joined()), have_met=True)


def _averaging(call: Call, *, divides_slopes: bool) -> tuple[Call, float]:
    """The call whose gradients of a head are divided by the number of ranks that have tokens of their own, and what its
    slopes are to be divided by: this number, if the gradients are added to others, and have no sum of their own.

    The gradients of hidden states, which belong to one rank, are then multiplied by it.
    """
    specification = call.specification
    shard = not_none(specification.shard)
    if not shard.is_own:
        return call, 1.0
    ranks = float(Collectives(shard.group_name).size)
    shard = shard._replace(hidden_factor=ranks) if divides_slopes else shard._replace(head_factor=1 / ranks)
    specification = specification._replace(shard=shard)
    return call._replace(specification=specification), ranks if divides_slopes else 1.0


def _reducing(call: Call, number: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """``work(*arguments)`` of a backward on ranks with the same tokens, which sum the gradient of hidden states."""
    widths = call.chunk_widths(needed=True) if not_none(call.specification.shard).input_grad != "partial" else []
    if not widths:
        return work(*arguments)  # no collective: a rank that fails holds up no other

    def steps() -> Iterator[_Step]:
        if call.cuts_tokens:
            return _Chunks(call).steps(reduces=True)
        shapes = [(len(call.target), width) for width in widths]
        return iter([_Step("all_reduce_", HIDDEN_GRADIENT, shape, call.reduce_dtype()) for shape in shapes])

    return _together(steps, doing(call, number), call, work, *arguments)


class _Chunks:
    """The chunks of a call as its source makes them, derived from the targets and the plan alone."""

    def __init__(self, call: Call) -> None:
        self._call, self._shard = call, not_none(call.specification.shard)
        collectives = Collectives(self._shard.group_name)
        self._ranks, self._rank = collectives.size, collectives.rank
        self._reduced = sum(call.chunk_widths(needed=True))  # columns of the gradients of hidden states
        target, num_tokens = call.target, len(call.target)
        if not call.is_head:
            self._rows = self._num_moved(target, [num_tokens])
            return
        size = call.plan_by_tokens(num_tokens, sums_head=call.sums_head).tokens
        if call.is_sequence:
            self._windows = windows_of(self._shard.sizes, size, self._rank)
            self._rows = [sum(window.counts) for window in self._windows]
        else:
            (counted,) = self._num_moved(target, [num_tokens])
            self._rows = [min(size, counted - at) for at in range(0, counted, size)]

    def _num_moved(self, target: Tensor, sizes: list[int]) -> list[int]:
        """How many of each chunk's tokens have statistics: those that count, or all where none is dropped."""
        if self._call.specification.settings.ignored != "drop":
            return sizes
        return [int((chunk != self._call.ignore_index).sum()) for chunk in torch.split(target, sizes)]

    def steps(self, *, combines: bool = False, reduces: bool = False) -> Iterator[_Step]:
        """The collectives in order: hidden states are gathered a chunk ahead, but a teacher's with their chunk, and
        their gradients, if needed, are reduced a chunk behind the statistics, if these are combined."""
        reduces = reduces and self._reduced > 0 and self._shard.input_grad != "partial"
        last = len(self._rows) - 1
        if last >= 0 and self._call.is_sequence:
            yield self._hidden(0)
        for at in range(last + 1):
            if at < last and self._call.is_sequence:
                yield self._hidden(at + 1)
            if self._call.is_sequence and self._shard.is_own and self._call.teacher:
                yield self._teacher(at)
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
        shape = self._windows[at].width, sum(self._call.chunk_widths())
        return _Step("all_gather", HIDDEN, shape, self._call.specification.settings.compute_dtype)

    def _teacher(self, at: int) -> _Step:
        window, teacher = self._windows[at], self._call.teacher
        if "hidden" in teacher:
            shape = window.width, teacher["hidden"].shape[1]
            return _Step("all_gather", TEACHER, shape, not_none(self._call.specification.teacher).dtype)
        sizes = Columns.of(window, self._shard.bounds, self._rank)
        dtype = teacher["logits" if "logits" in teacher else "probabilities"].dtype
        return _Step("all_to_all", TEACHER, (sum(sizes.sent),), dtype, tuple(sizes))

    def _reduction(self, at: int) -> _Step:
        kind, rows = "all_reduce_", self._rows[at]
        if self._call.is_sequence:
            kind, rows = "reduce_scatter", self._ranks * self._windows[at].width
        return _Step(kind, HIDDEN_GRADIENT, (rows, self._reduced), self._call.reduce_dtype())


def _together(
    steps: Callable[[], Iterator[_Step]],
    intent: Doing,
    call: Call,
    work: Callable[..., _Result],
    *arguments: Any,
    have_met: bool = False,
) -> _Result:
    """``work(*arguments)``, whose collectives are ``steps``; an error on one rank is raised on every rank."""
    ranks = Collectives(not_none(call.specification.shard).group_name)
    result: Any = None
    failure: Exception | None = None
    like = call.tensors[0]
    waits = like.device.type == "cpu" and ranks.size > 1
    if waits and not have_met:
        meeting.meet(ranks, intent, device=like.device)
    with Collectives.counted() as issued:
        try:
            result = work(*arguments)
        except CollectiveError:
            raise  # the other ranks cannot be reached
        except Exception as error:
            failure = error
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # frames hold the tensors that filled the memory
            _go_through(itertools.islice(steps(), issued.number, None), ranks, like)
    if waits:
        meeting.end(ranks, intent, failure)
    if failure is not None:
        raise failure
    done: _Result = result
    return done


def _go_through(steps: Iterator[_Step], collectives: Collectives, like: Tensor) -> None:
    for kind, what, shape, dtype, sizes in steps:
        getattr(collectives, kind)(like.new_full(shape, torch.nan, dtype=dtype), what, *sizes).wait()
