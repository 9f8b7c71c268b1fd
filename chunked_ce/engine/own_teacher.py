"""The side of a teacher where each rank has tokens of its own: what a rank needs of the others' arrives chunk by chunk.

The hidden states of a teacher's head are gathered, as the student's are. Of logits or probabilities that exist, each
rank sends every other one the columns that this one holds of the student, so that no rank ever gets a whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import CountedTokens
from chunked_ce.engine.teacher import TeacherSource
from chunked_ce.engine.windows import Window
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives, Pending
from chunked_ce.rows.teacher import TeacherRows

__all__ = ["TEACHER", "Columns", "OwnTeacher"]

TEACHER = "chunked_ce: the exchange of a teacher's tokens"


class Columns(NamedTuple):
    """Elements that a rank exchanges for a chunk: columns of its own tokens for columns of its own rows."""

    sent: list[int]  # to each rank
    received: list[int]  # from each rank

    @classmethod
    def of(cls, window: Window, bounds: Sequence[tuple[int, int]], rank: int) -> Columns:
        """Those of ``rank``, whose rows of the vocabulary are ``bounds[rank]``."""
        sizes = [stop - start for start, stop in bounds]
        return cls([window.mine * size for size in sizes], [count * sizes[rank] for count in window.counts])


class OwnTeacher(TeacherSource):
    """A teacher whose tensors hold this rank's tokens, with all columns of logits that exist."""

    def __init__(
        self,
        call: Call,
        tokens: CountedTokens,  # of all ranks
        own: CountedTokens,  # of this rank
        collectives: Collectives,
    ) -> None:
        super().__init__(call, tokens)
        self._own, self._collectives = own, collectives
        self._bounds = not_none(call.specification.shard).bounds
        self._pending: Pending | None = None
        self._window: Window | None = None

    def start(self, window: Window) -> None:
        """Start the exchange of a chunk, the next that `rows` is asked for and waits for."""
        self._window = window
        if self._existing is None:
            part = self._own.select(not_none(self._hidden), window.own).to(self._dtype)
            self._pending = self._collectives.all_gather(window.filled_up(part), TEACHER)
        else:
            sizes = Columns.of(window, self._bounds, self._collectives.rank)
            self._pending = self._collectives.all_to_all(self._columns(window), TEACHER, *sizes)

    def rows(self, rows: slice, entries: slice, most: int, in_flight: int = 1) -> TeacherRows:
        if self._existing is None:
            return super().rows(rows, entries, most, in_flight)
        arrived = self._arrived().view(rows.stop - rows.start, -1)
        return TeacherRows(
            arrived,
            self._logits,
            counted=self._tokens.kept_mask(rows),
            are_probabilities=self._are_probabilities,
            overwrite=True,
            share=self._share,
        )

    def _hidden_of(self, rows: slice) -> Tensor:
        return not_none(self._window).joined(self._arrived())

    def _arrived(self) -> Tensor:
        pending, self._pending = self._pending, None  # which holds what was sent
        return not_none(pending).wait()

    def _columns(self, window: Window) -> Tensor:
        """The logits of this rank's tokens of a chunk, the columns of one rank after those of another."""
        existing, places = not_none(self._existing), self._own.places(window.own, 0)
        places = places if self._index is None else self._index[places]
        if self._words is not None:  # a row has few of the columns of a larger vocabulary
            existing, places = existing[places], slice(None)
        sizes = [window.mine * (stop - start) for start, stop in self._bounds]
        packed = existing.new_empty(sum(sizes))
        for (start, stop), into in zip(self._bounds, torch.split(packed, sizes), strict=True):
            part = into.view(window.mine, stop - start)
            if self._words is not None:
                torch.index_select(existing, 1, self._words[start:stop], out=part)
            elif isinstance(places, slice):
                part.copy_(existing[places, start:stop])
            else:
                torch.index_select(existing[:, start:stop], 0, places, out=part)
        return packed
