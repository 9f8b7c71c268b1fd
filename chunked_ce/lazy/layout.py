"""What a head must know of the tensor-parallel layer that it is, whose rows lie on several ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from torch import Tensor, nn

from chunked_ce.parallel.vocab import VocabShard

__all__ = ["Layout", "LayoutWithForward"]

_Head = TypeVar("_Head", bound=nn.Module)


class Layout(ABC):
    """A layer that multiplies hidden states, the same on every rank of its group, with its rank's rows of the head."""

    vocab: VocabShard | None = None
    """This rank's rows; None if the weight, a DTensor, tells them."""

    @property
    @abstractmethod
    def has_all_words(self) -> bool:
        """Whether the layer's own output has the logits of all words, and not only those of this rank's."""

    @abstractmethod
    def takes(self, hidden: Any) -> bool:
        """Whether losses can be taken of the hidden states that the layer is called with."""

    def whole(self, hidden: Tensor) -> Tensor:
        """The hidden states (..., D) of all tokens on this rank, as a plain tensor that wants its complete gradient."""
        return hidden

    def without_its_steps(self, head: _Head) -> _Head:
        """``head`` without what the layer does before and after a product: a loss neither needs nor stands it."""
        return head

    @abstractmethod
    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of all words, (..., V), on every rank."""


class LayoutWithForward(Layout):
    """That of a layer whose parameters do not tell it, and whose ``forward`` the head's has replaced."""

    @abstractmethod
    def forward(self, head: nn.Module, input: Tensor) -> Tensor:
        """What the layer's own ``forward`` returns for ``input``."""
