"""Chunks of tokens that are sharded over ranks: each rank contributes to every chunk in proportion to its tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Window", "order_of", "windows_of"]


class Window(NamedTuple):
    """A chunk of the tokens of all ranks: a few tokens of each rank, in the order of the ranks."""

    counts: tuple[int, ...]  # tokens of each rank
    start: int  # of this rank's, among its own tokens
    mine: int  # tokens of this rank
    first: int  # token of the chunk, among those of all chunks

    @property
    def width(self) -> int:
        """The most tokens of a rank: collectives have that size on every rank."""
        return max(self.counts)

    @property
    def rows(self) -> slice:
        """The chunk among the tokens of all chunks."""
        return slice(self.first, self.first + sum(self.counts))

    @property
    def own(self) -> slice:
        """This rank's tokens of the chunk, among its own."""
        return slice(self.start, self.start + self.mine)

    @property
    def is_even(self) -> bool:
        return all(count == self.width for count in self.counts)

    def filled_up(self, part: Tensor) -> Tensor:
        """This rank's ``part`` (c, ...) with rows to the width; any values stand in these."""
        if len(part) == self.width:
            return part
        return torch.cat([part, part.new_zeros(self.width - len(part), *part.shape[1:])])

    def joined(self, gathered: Tensor) -> Tensor:
        """The tokens (C, ...) of the chunk, from the parts (R, width, ...) of all ranks."""
        if self.is_even:
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, self.counts, strict=True)])

    def spread(self, part: Tensor) -> Tensor:
        """The inverse of `joined`, (R * width, ...), with zeros in the rows that fill parts up."""
        if self.is_even:
            return part
        whole = part.new_zeros(len(self.counts), self.width, *part.shape[1:])
        for into, values, count in zip(whole, torch.split(part, list(self.counts)), self.counts, strict=True):
            into[:count] = values
        return whole.flatten(0, 1)


def windows_of(sizes: Sequence[int], tokens: int, rank: int) -> list[Window]:
    """The chunks of ranks that have ``sizes`` tokens: of at most ``tokens`` each, or of one token of each rank."""
    steps = _steps(sizes, tokens)
    counts = [
        tuple(max(0, min(step, size - at * step)) for size, step in zip(sizes, steps, strict=True))
        for at in range(_number(sizes, steps))
    ]
    firsts = itertools.accumulate(map(sum, counts), initial=0)
    return [
        Window(each, min(at * steps[rank], sizes[rank]), each[rank], first)
        for at, (each, first) in enumerate(zip(counts, firsts, strict=False))
    ]


def order_of(sizes: Sequence[int], tokens: int) -> Tensor:
    """The place of each token of the chunks among the tokens of all ranks, rank after rank, (n,) on the host."""
    steps = _steps(sizes, tokens)
    windows = [torch.arange(size) // max(1, step) for size, step in zip(sizes, steps, strict=True)]
    return torch.cat(windows).sort(stable=True).indices


def _steps(sizes: Sequence[int], tokens: int) -> list[int]:
    """Tokens of each rank in a chunk: those of the fewest chunks that hold at most ``tokens``."""
    tokens = max(tokens, sum(size > 0 for size in sizes))

    def steps(number: int) -> list[int]:
        return [-(-size // number) for size in sizes]

    low, high = 1, max(1, *sizes)
    while low < high:
        middle = (low + high) // 2
        if sum(steps(middle)) <= tokens:
            high = middle
        else:
            low = middle + 1
    return steps(low)


def _number(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return max(-(-size // step) if size else 0 for size, step in zip(sizes, steps, strict=True))
