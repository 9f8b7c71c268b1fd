"""How ranks, one or many, combine a chunk's statistics and sum the gradient of its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce.engine.head_gradients import HiddenGradient
from chunked_ce.engine.sources import Chunk, SequenceSource, Source
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives, Pending
from chunked_ce.rows.statistics import merge_shards

__all__ = ["HIDDEN_GRADIENT", "STATISTICS", "ManyRanks", "OneRank", "ranks_of"]

STATISTICS = "chunked_ce: the all-gather of row statistics"
HIDDEN_GRADIENT = "chunked_ce: the reduction of hidden gradients"


class Combining:
    """Statistics in flight: `wait` returns the part (C, columns) of the whole vocabulary."""

    def __init__(self, pending: Sequence[Pending], names: tuple[str, ...]) -> None:
        self._pending, self._names = pending, names

    def wait(self) -> Tensor:
        parts = [merge_shards(pending.wait(), self._names) for pending in self._pending]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Reducing:
    """Gradients (C, D) of hidden states in flight, in one collective: `wait` returns their sums over the ranks."""

    def __init__(self, parts: list[Tensor], pending: Pending | None = None) -> None:
        self._pending, self._parts = pending, parts if pending is None else []
        self._widths = [part.shape[1] for part in parts]

    def wait(self) -> Sequence[Tensor]:
        return self._parts if self._pending is None else torch.split(self._pending.wait(), self._widths, 1)


class OneRank:
    """The rank that holds the whole vocabulary."""

    in_flight = 1  # chunks whose statistics are in flight at a time

    def __init__(self, source: Source) -> None:
        self.source = source

    def combine(self, part: Tensor, names: tuple[str, ...]) -> Pending | Combining:
        """Start combining the ranks' parts (C, columns) of a chunk's statistics, those of one pass."""
        return Pending(part, None, STATISTICS)

    def reduce(self, chunk: Chunk, parts: list[Tensor]) -> Reducing:
        """Start summing the gradients of a chunk's hidden states, (C, D) and (C, r) of an adapter, over the ranks."""
        return Reducing(parts)

    def put(self, total: HiddenGradient, chunk: Chunk, part: Tensor) -> None:
        """Write a result of `reduce` into the gradient of this rank's hidden states, (N, D)."""
        self.source.put(total, chunk.rows, part)

    def reduce_whole(self, total: HiddenGradient) -> HiddenGradient:
        """The gradient of the hidden states of all chunks, (N, D), summed over the ranks."""
        return total


class ManyRanks(OneRank):
    """Ranks that share the vocabulary; all of them issue the same collectives in the same order."""

    in_flight = 2

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        call = source.call
        self._shard = not_none(call.specification.shard)
        self._collectives = Collectives(self._shard.group_name)
        self._dtype = call.reduce_dtype()
        # Tokens in one collective of statistics: a chunk of the plan by tokens, equal on all ranks; None for a chunk.
        self._at_a_time = None
        if call.is_head and not call.is_sequence:
            self._at_a_time = call.plan_by_tokens(len(call.target), sums_head=call.sums_head).tokens

    def combine(self, part: Tensor, names: tuple[str, ...]) -> Combining:
        pieces = torch.split(part, self._at_a_time) if self._at_a_time else (part,)
        return Combining([self._collectives.all_gather(piece, STATISTICS) for piece in pieces], names)

    def reduce(self, chunk: Chunk, parts: list[Tensor]) -> Reducing:
        if self._shard.input_grad == "partial":
            return Reducing(parts)
        part = parts[0].to(self._dtype) if len(parts) == 1 else torch.cat([part.to(self._dtype) for part in parts], 1)
        if not isinstance(self.source, SequenceSource):
            return Reducing(parts, self._collectives.all_reduce_(part, HIDDEN_GRADIENT))
        return Reducing(parts, self._collectives.reduce_scatter(not_none(chunk.window).spread(part), HIDDEN_GRADIENT))

    def put(self, total: HiddenGradient, chunk: Chunk, part: Tensor) -> None:
        if isinstance(self.source, SequenceSource):
            self.source.put_reduced(total, chunk, part)
        else:
            super().put(total, chunk, part)

    def reduce_whole(self, total: HiddenGradient) -> HiddenGradient:
        if self._shard.input_grad == "partial":
            return total
        assert isinstance(total, Tensor)  # several depths are reduced chunk by chunk
        return self._collectives.all_reduce_(total, HIDDEN_GRADIENT).wait()


def ranks_of(source: Source) -> OneRank:
    return OneRank(source) if source.call.specification.shard is None else ManyRanks(source)
