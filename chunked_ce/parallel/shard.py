"""A `chunked_ce.VocabShard` as plain values, which operators can take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Shard"]


class Shard(NamedTuple):
    group_name: str
    start: int
    total: int
    input_grad: str
    reduce_dtype: torch.dtype | None
    tokens: str = "same"
    sizes: tuple[int, ...] = ()  # counted tokens of each rank, once ranks that hold different hidden states know them
    bounds: tuple[tuple[int, int], ...] = ()  # of each rank's rows, where ranks that have tokens of their own know them
    hidden_factor: float = 1.0  # of the gradients of hidden states, once they are summed
    head_factor: float = 1.0  # of those of a head's rows

    @property
    def is_own(self) -> bool:
        """Whether each rank has tokens of its own: hidden states, targets and losses."""
        return self.tokens == "own"

    @property
    def is_sequence(self) -> bool:
        """Whether each rank's hidden states are its share of the tokens."""
        return self.is_own or self.input_grad == "sequence"

    def class_weight(self, whole: Tensor | None, rows: int) -> Tensor | None:
        """This shard's part of the class weights (V,)."""
        return None if whole is None else whole[self.start : self.start + rows]
