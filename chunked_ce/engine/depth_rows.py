"""Rows of several depths of multi-token prediction, taken as rows of one tensor that never exists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from chunked_ce.engine.counted_tokens import CountedTokens

__all__ = ["DepthRows"]


class DepthRows:
    """Selects the rows of counted tokens across tensors (N_1, ...) to (N_k, ...), and writes results back to them.

    ``tokens`` are those of all depths, one depth after another.
    """

    def __init__(self, tokens: CountedTokens, sizes: Sequence[int]) -> None:
        self._tokens = tokens
        self._starts = [0, *itertools.accumulate(sizes)]  # of each depth among all tokens, and their number
        self._firsts = tokens.num_before(self._starts)  # of each depth among the counted tokens, and their number

    def select(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        """The rows (C, ...) of the counted tokens ``rows``: a copy of them alone, or a view of one depth."""
        parts = [
            tensors[depth][places] if isinstance(places, slice) else tensors[depth].index_select(0, places)
            for depth, places, _ in self._pieces(rows)
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else tensors[0][:0]
        return self._tokens.mask(whole, rows)

    def put(self, tensors: Sequence[Tensor | None], rows: slice, part: Tensor) -> None:
        """Write ``part`` (C, ...) to the rows of the counted tokens ``rows``, except in depths that are None."""
        for depth, places, piece in self._pieces(rows):
            tensor = tensors[depth]
            if tensor is None:
                continue
            if isinstance(places, slice):
                tensor[places] = part[piece]
            else:
                tensor.index_copy_(0, places, part[piece].to(tensor.dtype))

    def _pieces(self, rows: slice) -> Iterator[tuple[int, slice | Tensor, slice]]:
        """Each depth that has some of the rows, their places in its tensor, and among the ``rows``."""
        for depth, (first, end) in enumerate(itertools.pairwise(self._firsts)):
            within = slice(max(rows.start, first), min(rows.stop, end))
            if within.start < within.stop:
                piece = slice(within.start - rows.start, within.stop - rows.start)
                yield depth, self._tokens.places(within, self._starts[depth]), piece
