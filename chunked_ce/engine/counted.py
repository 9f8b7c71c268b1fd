"""The tokens that count: those whose target is not ignored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chunked_ce.objective import RowStatistics

__all__ = ["CountedTokens", "columns_of", "drops_ignored"]


def drops_ignored(device: torch.device) -> bool:
    """Whether the host may know how many tokens count without waiting for the device."""
    return device.type == "cpu"


def columns_of(target: Tensor, first_word: int, words: int, counted: Tensor | None = None) -> Tensor:
    """The targets (n,) counted from ``first_word`` on, -1 where they are none of the ``words`` or not ``counted``."""
    column = target - first_word
    here = (column >= 0) & (column < words)
    return column.where(here if counted is None else here & counted, -1)


class CountedTokens:
    """Picks the rows of tokens that count out of per-token tensors, and puts results back in their places.

    On the CPU ignored tokens are dropped, so that they cost nothing. An accelerator would have to tell the host how
    many are left; there they stay, with hidden states of zero and ``target`` 0, and `mask` takes them out of the
    coefficients.

    Raises ``IndexError`` for a target outside [0, vocab_size) that is not ignored; on an accelerator a device-side
    assertion fails instead.
    """

    def __init__(self, target: Tensor, ignore_index: int, vocab_size: int) -> None:
        self.num_tokens = len(target)  # N, the ignored ones too
        counted = target != ignore_index  # (N,)
        out_of_range = counted & ((target < 0) | (target >= vocab_size))
        self._index: Tensor | None = None
        self._mask: Tensor | None = None
        if drops_ignored(target.device):
            if out_of_range.any():
                position = int(out_of_range.nonzero()[0])
                raise IndexError(
                    f"target at position {position} (of the flattened tokens) is {int(target[position])}, "
                    f"allowed are [0, {vocab_size}) and ignore_index={ignore_index}"
                )
            if not counted.all():
                self._index = counted.nonzero().squeeze(-1)
        else:
            torch._assert_async(out_of_range.any().logical_not(), "a target is neither in [0, V) nor ignore_index")
            self._mask = counted
        self.target = self.select(target)  # (n,)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def all_kept(self) -> bool:
        """Whether row i of what `select` returns is token i."""
        return self._index is None

    def blocks(self, size: int) -> Iterator[slice]:
        """The counted tokens in blocks of ``size``; the last may be smaller."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def columns(self, first_word: int, words: int) -> Tensor:
        """The targets (n,) counted from ``first_word`` on, -1 where they are none of the ``words`` that follow it."""
        return columns_of(self.target, first_word, words)

    def within(self, start: int, stop: int) -> slice:
        """The counted tokens among the tokens ``start`` to ``stop``."""
        if self._index is None:
            return slice(start, stop)
        bounds = torch.tensor([start, stop], device=self._index.device)
        first, last = torch.searchsorted(self._index, bounds).tolist()
        return slice(first, last)

    def select(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """The rows of ``values`` (N, ...) that belong to the counted tokens ``rows``."""
        if self._index is not None:
            return values.index_select(0, self._index[rows])
        if self._mask is None:
            return values[rows]
        mask = self._mask[rows].view(-1, *(1,) * (values.dim() - 1))
        return values[rows].where(mask, 0)

    def unmasked(self, values: Tensor, rows: slice) -> Tensor:
        """`select`, but what tokens that do not count were kept with is still there: a view of ``values`` then."""
        return values[rows] if self._index is None else values.index_select(0, self._index[rows])

    def select_from(self, part: Tensor, first: int, rows: slice) -> Tensor:
        """`select` from ``part``, which holds the tokens from ``first`` on."""
        if self._index is not None:
            return part.index_select(0, self._index[rows] - first)
        return part if self._mask is None else part.where(self._mask[rows].unsqueeze(-1), 0)

    def put_into(self, part: Tensor, first: int, rows: slice, values: Tensor) -> None:
        """`put` into ``part``, which holds the tokens from ``first`` on."""
        part.index_copy_(0, self._index[rows] - first, values)

    def put(self, values: Tensor, rows: slice, part: Tensor) -> None:
        """Write ``part`` to the rows of ``values`` (N, ...) that belong to the counted tokens ``rows``."""
        if self._index is None:
            values[rows] = part
        else:
            values.index_copy_(0, self._index[rows], part.to(values.dtype))

    def put_statistics(self, found: RowStatistics, rows: slice, part: RowStatistics) -> None:
        """`put` for every statistic there is, 0 for tokens that do not count."""
        for whole, values in zip(found, part, strict=True):
            if whole is not None:
                self.put(whole, rows, self.mask(values, rows))

    def mask(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """``values`` of the tokens ``rows``, 0 for those that do not count but were kept."""
        return values if self._mask is None else values.where(self._mask[rows], 0)
