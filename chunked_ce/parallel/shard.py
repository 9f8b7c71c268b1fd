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

    @property
    def is_sequence(self) -> bool:
        """Whether each rank's input holds its share of the tokens."""
        return self.input_grad == "sequence"

    def class_weight(self, whole: Tensor | None, rows: int) -> Tensor | None:
        """This shard's part of the class weights (V,)."""
        return None if whole is None else whole[self.start : self.start + rows]
