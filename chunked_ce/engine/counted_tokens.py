"""The tokens that count: those whose target is not ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistics import RowStatistics, along

__all__ = ["CountedTokens", "Places", "check_range", "columns_of", "rows_at"]


class Places(NamedTuple):
    """Where the n counted tokens are among all, in ascending order: what the device needs, and the host."""

    on_device: Tensor  # (n,)
    on_host: Tensor  # (n,)

    @classmethod
    def of(cls, counted: Tensor, device: torch.device) -> Places | None:
        """The places on ``device`` of the tokens that are ``counted`` (N,), on the host; None if all are."""
        return None if counted.all() else cls.at(counted.nonzero().squeeze(-1), device)

    @classmethod
    def at(cls, on_host: Tensor, device: torch.device) -> Places:
        return cls(devices.moved(on_host, device), on_host)


def columns_of(target: Tensor, start: int, size: int, counted: Tensor | None = None) -> Tensor:
    """The targets (n,) minus ``start``, -1 where they are outside [start, start + size) or not ``counted``."""
    column = target - start
    is_local = (column >= 0) & (column < size)
    return column.where(is_local if counted is None else is_local & counted, -1)


def check_range(name: str, ids: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raise ``IndexError`` unless each id (N, ...) is in [0, vocab_size) or ``ignore_index``; on an accelerator a
    device-side assertion fails instead."""
    out_of_range = ((ids < 0) | (ids >= vocab_size)) & (ids != ignore_index)
    if not devices.reads_at_once(ids.device):
        message = f"a {name} is neither in [0, V) nor ignore_index"
        torch._assert_async(out_of_range.any().logical_not(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif out_of_range.any():
        position = out_of_range.nonzero()[0]
        where, *rest = position.tolist()
        where = f"{where} (of the flattened tokens)" if not rest else f"{tuple(position.tolist())}"
        raise IndexError(
            f"{name} at position {where} is {int(ids[tuple(position)])}, "
            f"allowed are [0, {vocab_size}) and ignore_index={ignore_index}"
        )


class CountedTokens:
    """Selects the rows of counted tokens from per-token tensors, and writes results back to their places.

    ``ignored`` tokens are dropped ("drop"), so that they cost nothing, or kept ("mask"), with hidden states and
    ``target`` 0, and `mask` zeroes their coefficients; "none": all count. To drop them the host reads ``target``, and
    waits for an accelerator, unless it has the ``places`` of the others.

    Raises ``IndexError`` for a target outside [0, vocab_size) that is not ignored; on an accelerator a device-side
    assertion fails instead.
    """

    def __init__(
        self, target: Tensor, ignore_index: int, vocab_size: int, ignored: str, places: Places | None = None
    ) -> None:
        self.num_tokens = len(target)  # N, including ignored ones
        check_range("target", target, ignore_index, vocab_size)
        if ignored == "drop" and places is None:
            places = Places.of(devices.read(target != ignore_index), target.device)
        self._places = places
        self._index = None if places is None else places.on_device
        self._mask = target != ignore_index if ignored == "mask" else None  # (N,)
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

    def num_before(self, positions: list[int]) -> list[int]:
        """How many tokens are kept before each of the ascending ``positions`` among all tokens."""
        if self._places is None:
            return positions
        return torch.searchsorted(self._places.on_host, torch.tensor(positions)).tolist()

    def places(self, rows: slice, start: int) -> slice | Tensor:
        """Where the counted tokens ``rows`` are among all tokens from ``start`` on."""
        if self._index is None:
            return slice(rows.start - start, rows.stop - start)
        return self._index[rows] - start

    def select(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """The rows of ``values`` (N, ...) that belong to the counted tokens ``rows``."""
        if self._index is not None:
            return values.index_select(0, self._index[rows])
        if self._mask is None:
            return values[rows]
        return self.mask(values[rows], rows)

    def unmasked(self, values: Tensor, rows: slice) -> Tensor:
        """`select`, but without zeros for ignored tokens that are kept: then a view of ``values``."""
        return values[rows] if self._index is None else values.index_select(0, self._index[rows])

    def put(self, values: Tensor, rows: slice, part: Tensor) -> None:
        """Write ``part`` to the rows of ``values`` (N, ...) that belong to the counted tokens ``rows``."""
        if self._index is None:
            values[rows] = part
        else:
            values.index_copy_(0, self._index[rows], part.to(values.dtype))

    def put_statistics(self, whole: RowStatistics, rows: slice, part: RowStatistics) -> None:
        """`put` every statistic, 0 for ignored tokens."""
        for into, values in zip(whole, part, strict=True):
            if into is not None:
                self.put(into, rows, self.mask(not_none(values), rows))

    def kept_mask(self, rows: slice) -> Tensor | None:
        """Which of the tokens ``rows`` count, where ignored ones are kept."""
        return None if self._mask is None else self._mask[rows]

    def mask(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """``values`` of the tokens ``rows``, 0 for ignored tokens that are kept."""
        return values if self._mask is None else values.where(along(self._mask[rows], values), 0)


def rows_at(places: Places | None, number: int) -> CountedTokens:
    """The tokens at these ``places`` among a ``number`` of them, or all; their targets are not known."""
    device = "cpu" if places is None else places.on_device.device
    target = torch.zeros((), dtype=torch.int64, device=device).expand(number)
    return CountedTokens(target, -1, 1, "none" if places is None else "drop", places)
