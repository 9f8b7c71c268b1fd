"""The chunk loops with the vocabulary sharded over ranks: the twins of `chunked_ce.engine.linear`.

Each chunk takes one collective for the statistics of its rows, started before the next chunk's product and waited for
after it, and one for the gradient of its hidden states, which runs beside the product for the head's gradient. Chunks
follow from what all ranks share, so that every rank issues the same collectives in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.distributed.collectives import Collectives, Pending
from chunked_ce.engine.backprop import Backprop, Gradients, Targets, adds_directly, new_gradients
from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.filtered import Kept
from chunked_ce.engine.kernels import row_kernels as choose_row_kernels
from chunked_ce.engine.linear import Head, Settings, Sums, new_filter
from chunked_ce.engine.linear import gradients as local_gradients
from chunked_ce.engine.linear import shard_statistics as local_statistics
from chunked_ce.engine.products import project
from chunked_ce.engine.rows import Slopes, Wanted, empty_statistics
from chunked_ce.engine.scratch import logits_scratch
from chunked_ce.objective import Logits, Objective, RowStatistics, combine_shards

__all__ = [
    "HIDDEN",
    "HIDDEN_GRADIENT",
    "STATISTICS",
    "Shard",
    "gradients",
    "logits_statistics",
    "loss_and_gradients",
    "reduce_dtype",
    "statistics",
]

STATISTICS = "chunked_ce: the all-gather of row statistics"
HIDDEN = "chunked_ce: the all-gather of hidden states"
HIDDEN_GRADIENT = "chunked_ce: the reduction of hidden gradients"


class Shard(NamedTuple):
    """A `chunked_ce.VocabShard` as plain values, which operators can be given."""

    group_name: str
    start: int
    total: int
    input_grad: str
    reduce_dtype: torch.dtype | None

    def classes(self, class_weight: Tensor | None, rows: int) -> Tensor | None:
        """This shard's part of the class weights (V,)."""
        return None if class_weight is None else class_weight[self.start : self.start + rows]

    def planned_shape(self, weight: Tensor) -> tuple[int, int]:
        """What chunks are planned for: the largest of even shards, which every rank knows alike, and D."""
        ranks = Collectives(self.group_name).size
        return -(-self.total // ranks), weight.shape[1]

    def planned(
        self, num_tokens: int, weight: Tensor, settings: Settings, *, sums_head: bool
    ) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """What `chunked_ce.plan` is asked for the chunks of a call, the same on every rank."""
        head_dtype = settings.planned_head_dtype(weight) if sums_head else None
        return (num_tokens, *self.planned_shape(weight)), {"head_dtype": head_dtype, "in_flight": 2, **settings.planned}


class _Chunk(NamedTuple):
    rows: slice  # of the counted tokens
    x: Tensor  # (C, D)
    products: Tensor  # (C, V_r)
    window: slice  # of this rank's tokens, where they are sharded


def statistics(
    hidden: Tensor,  # (N, D), or (N / R, D) of a sequence shard
    head: Head,  # V_r rows; the class weights of the whole vocabulary
    target: Tensor,  # (N,)
    ignore_index: int,
    wanted: Wanted,
    settings: Settings,
    shard: Shard,
) -> RowStatistics:
    """The statistics of every row over the whole vocabulary, (N,) each and 0 for tokens that do not count."""
    found = empty_statistics(len(target), settings.compute_dtype, hidden.device, wanted)
    if shard.input_grad == "sequence":
        run = _Run(hidden, head, target, ignore_index, wanted, settings, shard, sums_head=True)

        def finish_chunk(chunk: _Chunk, pending: Pending) -> None:
            run.tokens.put_statistics(found, chunk.rows, run.combine(chunk.rows, pending))

        _pipeline(run.chunks(), run.start_statistics, finish_chunk)
        return run.in_order(found)

    tokens = CountedTokens(target, ignore_index, shard.total)
    if len(tokens) == 0:
        return found
    local = head._replace(class_weight=shard.classes(head.class_weight, len(head.weight)))
    part = local_statistics(hidden, local, tokens, shard.start, wanted, settings)
    collectives = Collectives(shard.group_name)

    def finish(rows: slice, pending: Pending) -> None:
        combined = combine_shards(pending.wait(), tokens.target[rows], **wanted._asdict())
        tokens.put_statistics(found, rows, combined)

    shape, keywords = shard.planned(len(target), head.weight, settings, sums_head=False)
    chunk = plan.tokens_per_chunk(*shape, **keywords)
    _pipeline(tokens.blocks(chunk), lambda rows: collectives.all_gather(part[rows], STATISTICS), finish)
    return found


def loss_and_gradients(
    hidden: Tensor,  # (N, D), or (N / R, D) of a sequence shard
    head: Head,  # V_r rows; the class weights of the whole vocabulary
    target: Tensor,  # (N,)
    coefficient: Tensor,  # (N,) float64
    objective: Objective,  # of the whole vocabulary
    ignore_index: int,
    wanted: Wanted,
    needed: tuple[bool, bool, bool],
    settings: Settings,
    shard: Shard,
) -> tuple[Tensor, Gradients, Tensor | None, RowStatistics]:
    """The loss over the whole vocabulary, the gradients of this rank's tensors, those of the targets' logits, and the
    statistics of every row; as of `chunked_ce.engine.linear.loss_and_gradients`."""
    run = _Run(hidden, head, target, ignore_index, wanted, settings, shard, sums_head=needed[1])
    coefficient = run.chunk_order(coefficient)
    sums = Sums(hidden, head, run.tokens, coefficient, objective, wanted, needed, settings, run.head_sum_dtype)
    backprop = run.backprop(sums.gradients, smoothed=wanted.weighted)

    def finish(chunk: _Chunk, pending: Pending) -> None:
        part = run.combine(chunk.rows, pending)
        scale = None
        if settings.scales_chunks and len(chunk.x):  # a sequence's chunk may have no token that counts
            slopes, scale = sums.scaled_slopes(chunk.rows, part, largest=backprop.largest_gradient)
        else:
            slopes = sums.slopes(chunk.rows, part)
        backprop.set_scale(scale)
        kept, targets = run.differentiate(chunk, slopes, part, backprop)
        sums.add_losses(chunk.rows, part)
        run.spend(chunk, kept, targets, backprop, weight_later=sums.keep_targets(chunk.rows, targets))

    _pipeline(run.chunks(), run.start_statistics, finish)
    backprop.finish()
    return sums.loss, sums.gradients, sums.targets, run.in_order(sums.statistics)


def gradients(
    hidden: Tensor,  # (N, D), or (N / R, D) of a sequence shard
    head: Head,  # V_r rows; the class weights of the whole vocabulary
    target: Tensor,  # (N,)
    known: RowStatistics,
    slopes: Slopes,
    ignore_index: int,
    needed: tuple[bool, bool, bool],
    settings: Settings,
    shard: Shard,
    weight_sum: Tensor | None = None,
) -> Gradients:
    """The gradients of this rank's tensors: one reduction of the hidden states' at the end."""
    if shard.input_grad == "sequence":
        return _sequence_gradients(
            hidden, head, target, known, slopes, ignore_index, needed, settings, shard, weight_sum
        )
    local = head._replace(class_weight=shard.classes(head.class_weight, len(head.weight)))
    partial = shard.input_grad == "partial"
    total = local_gradients(
        hidden,
        local,
        target,
        known,
        slopes,
        ignore_index,
        needed,
        settings,
        words=(shard.start, shard.total),
        hidden_dtype=None if partial else reduce_dtype(shard, settings),
        weight_sum=weight_sum,
    )
    if total.hidden is None or partial:
        return total
    reduced = Collectives(shard.group_name).all_reduce_(total.hidden, HIDDEN_GRADIENT).wait()
    return total._replace(hidden=reduced.to(hidden.dtype))


def _sequence_gradients(
    hidden: Tensor,  # (N / R, D)
    head: Head,
    target: Tensor,  # (N,)
    known: RowStatistics,
    slopes: Slopes,
    ignore_index: int,
    needed: tuple[bool, bool, bool],
    settings: Settings,
    shard: Shard,
    weight_sum: Tensor | None,
) -> Gradients:
    """`gradients` chunk by chunk, so that no rank ever holds the hidden states of all."""
    run = _Run(hidden, head, target, ignore_index, Wanted(), settings, shard, sums_head=True)  # chunks of `statistics`
    needed = (needed[0], needed[1] and not adds_directly(weight_sum, run.head_sum_dtype), needed[2])
    known = known.map(run.chunk_order).map(run.tokens.select)
    slopes = slopes.map(run.chunk_order).map(run.tokens.select)
    slopes = slopes.map(lambda slope: run.tokens.mask(slope) * head.logits.scale)
    total = new_gradients(
        hidden,
        head.weight,
        head.bias,
        run.tokens,
        needed,
        run.head_sum_dtype,
        zero_head=settings.gradient_filter is not None,
    )
    backprop = run.backprop(
        total, smoothed=slopes.weighted is not None, entropy=slopes.mean is not None, weight_sum=weight_sum
    )
    for chunk in run.chunks():
        found = run.differentiate(chunk, slopes.at(chunk.rows), known.at(chunk.rows), backprop)
        run.spend(chunk, *found, backprop)
    return backprop.finish().as_dtype_of(head.weight, head.bias)


def logits_statistics(
    products: Tensor,  # (N, V_r)
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    ignore_index: int,
    wanted: Wanted,
    backend: str,
    shard: Shard,
) -> RowStatistics:
    """The statistics of rows of logits that exist, sharded by columns: one collective."""
    n, vocab_size = products.shape
    row_kernels = choose_row_kernels(backend, products.device, products.dtype)
    tokens = CountedTokens(target, ignore_index, shard.total)
    column = tokens.columns(shard.start, vocab_size)
    class_weight = shard.classes(class_weight, vocab_size)
    parts = [
        row_kernels.shard_statistics(
            tokens.unmasked(products, rows),
            column[rows].clamp(min=0),
            column[rows] >= 0,
            class_weight,
            logits,
            wanted,
            shard.start,
        )
        for rows in tokens.blocks(row_kernels.rows_in_flight(vocab_size, products.device.type))
    ]
    found = empty_statistics(n, products.dtype, products.device, wanted)
    if parts:
        gathered = Collectives(shard.group_name).all_gather(torch.cat(parts), STATISTICS).wait()
        tokens.put_statistics(found, slice(None), combine_shards(gathered, tokens.target, **wanted._asdict()))
    return found


def _pipeline(
    chunks: Iterator[_Chunk],
    start: Callable[[_Chunk], Any],
    finish: Callable[[_Chunk, Any], None],
) -> None:
    """``start`` each chunk, and ``finish`` it once the next one has started."""
    previous = None
    for chunk in chunks:
        begun = chunk, start(chunk)
        if previous is not None:
            finish(*previous)
        previous = begun
    if previous is not None:
        finish(*previous)


def reduce_dtype(shard: Shard, settings: Settings) -> torch.dtype:
    return shard.reduce_dtype or torch.promote_types(settings.accumulate_dtype, settings.compute_dtype)


class _Run:
    """One loss: the tokens in the order of the chunks, the chunks, and their collectives."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target: Tensor,
        ignore_index: int,
        wanted: Wanted,
        settings: Settings,
        shard: Shard,
        *,
        sums_head: bool,
    ) -> None:
        self._collectives = Collectives(shard.group_name)
        self._shard = shard
        self._wanted = wanted
        self._settings = settings
        self._row_kernels = settings.row_kernels(hidden.device)
        self._hidden = hidden
        self._sequence = shard.input_grad == "sequence"
        self.class_weight = shard.classes(head.class_weight, len(head.weight))
        ranks = self._collectives.size
        shape, keywords = shard.planned(len(target), head.weight, settings, sums_head=sums_head)
        self.head_sum_dtype = plan.head_sum_dtype(*shape, **keywords)
        self._chunk = plan.tokens_per_chunk(*shape, **keywords)
        self._largest = min(self._chunk, len(target))
        self._order = None
        if self._sequence:
            self._chunk = max(1, self._chunk // ranks)  # of each rank's tokens
            self._largest = min(self._chunk * ranks, len(target))
            places = torch.arange(len(target), device=target.device).view(ranks, -1)
            self._order = torch.cat([part.flatten() for part in places.split(self._chunk, dim=1)])
        self.tokens = CountedTokens(self.chunk_order(target), ignore_index, shard.total)
        self._column = self.tokens.columns(shard.start, len(head.weight))
        self.head = head.to(settings.compute_dtype)

    def chunk_order(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) of the tokens in the order in which the chunks take them."""
        return values if self._order is None else values[self._order]

    def in_order(self, found: RowStatistics) -> RowStatistics:
        """The statistics in the order of the targets."""
        if self._order is None:
            return found
        return found.map(lambda values: torch.empty_like(values).index_copy_(0, self._order, values))

    def chunks(self) -> Iterator[_Chunk]:
        buffers: list[Tensor] = []
        for turn, (rows, x, window) in enumerate(self._sequence_parts() if self._sequence else self._parts()):
            if turn < 2:
                buffers.append(logits_scratch(self._largest, len(self.head.weight), dtype=x.dtype, device=x.device))
            out = buffers[turn % 2][: len(x)]
            yield _Chunk(rows, x, project(x, self.head.weight, self.head.bias, out=out), window)

    def _parts(self) -> Iterator[tuple[slice, Tensor, slice]]:
        """Each chunk's rows and hidden states, which every rank has."""
        for rows in self.tokens.blocks(self._chunk):
            yield rows, self.tokens.select(self._hidden, rows).to(self.head.weight.dtype), rows

    def _sequence_parts(self) -> Iterator[tuple[slice, Tensor, slice]]:
        """Each chunk's rows and hidden states, gathered while the chunk before is worked on."""
        ranks = self._collectives.size
        windows = [slice(at, at + self._chunk) for at in range(0, len(self._hidden), self._chunk)]

        def gather(window: slice) -> Pending:
            return self._collectives.all_gather(self._hidden[window].to(self.head.weight.dtype), HIDDEN)

        pending = gather(windows[0]) if windows else None
        for window, following in itertools.zip_longest(windows, windows[1:]):
            gathered = pending.wait().flatten(0, 1)  # (R * c, D)
            pending = None if following is None else gather(following)
            first = window.start * ranks
            rows = self.tokens.within(first, first + len(gathered))
            yield rows, self.tokens.select_from(gathered, first, rows), window

    def backprop(self, total: Gradients, weight_sum: Tensor | None = None, **slopes: bool) -> Backprop:
        head = self.head._replace(class_weight=self.class_weight)
        filter = new_filter(head, self._settings, vocab_size=self._shard.total, **slopes)
        return Backprop(total, head.weight, filter, self._row_kernels, weight_sum)

    def start_statistics(self, chunk: _Chunk) -> Pending:
        part = self._row_kernels.shard_statistics(
            chunk.products,
            self._column[chunk.rows].clamp(min=0),
            self._column[chunk.rows] >= 0,
            self.class_weight,
            self.head.logits,
            self._wanted,
            self._shard.start,
        )
        return self._collectives.all_gather(part, STATISTICS)

    def combine(self, rows: slice, pending: Pending) -> RowStatistics:
        return combine_shards(pending.wait(), self.tokens.target[rows], **self._wanted._asdict())

    def differentiate(
        self, chunk: _Chunk, slopes: Slopes, known: RowStatistics, backprop: Backprop
    ) -> tuple[Kept | None, Targets | None]:
        """Write the gradients of a chunk's products over them, and choose which columns to keep: None is all. Those of
        the targets where they are apart."""
        column = self._column[chunk.rows]
        columns, targets = backprop.new_columns(), backprop.new_targets(column)
        self._row_kernels.logit_gradients(
            chunk.products,
            column,
            self.class_weight,
            self.head.logits,
            slopes,
            known,
            out=chunk.products,
            columns=columns,
            **({} if targets is None else {"apart": targets.gradient}),
        )
        return backprop.keep(chunk.products, columns, column, slopes), targets

    def spend(
        self,
        chunk: _Chunk,
        kept: Kept | None,
        targets: Targets | None,
        backprop: Backprop,
        *,
        weight_later: bool = False,
    ) -> None:
        """Add what a chunk's logit gradients give to the gradients of this rank's tensors."""
        total = backprop.total
        reduction = None
        if total.hidden is not None:
            reduction = self._start_hidden_gradient(chunk, backprop.hidden(chunk.products, kept, targets))
        backprop.add_head(chunk.x, chunk.products, kept, targets, weight_later=weight_later)
        if reduction is None:
            return
        part = reduction.wait()
        if self._sequence:
            total.hidden[chunk.window] = part
        else:
            self.tokens.put(total.hidden, chunk.rows, part)

    def _start_hidden_gradient(self, chunk: _Chunk, part: Tensor) -> Pending:
        """Start to reduce this rank's part (C, D)."""
        if self._shard.input_grad == "partial":
            return Pending(part, None, HIDDEN_GRADIENT)
        part = part.to(reduce_dtype(self._shard, self._settings))
        if not self._sequence:
            return self._collectives.all_reduce_(part, HIDDEN_GRADIENT)
        ranks = self._collectives.size
        whole = part
        if not self.tokens.all_kept:
            places = len(self._hidden[chunk.window]) * ranks
            whole = part.new_zeros(places, part.shape[1])
            self.tokens.put_into(whole, chunk.window.start * ranks, chunk.rows, part)
        return self._collectives.reduce_scatter(whole, HIDDEN_GRADIENT)
