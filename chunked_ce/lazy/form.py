"""How the logits that lazy tensors speak of are formed from the product of hidden states and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.statistics import Logits

__all__ = ["Form"]


class Form(NamedTuple):
    """Logits ``scale * (product + bias)``, through a softcap, over a temperature."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (V,), besides the head's
    temperature: Tensor | None = None  # of each token, in the shape of the logits with 1 in place of V

    @property
    def logits(self) -> Logits:
        return Logits(self.scale, self.softcap)

    def __call__(self, product: Tensor) -> Tensor:
        """The logits (..., V) of a product (..., V)."""
        found = self.logits(product if self.bias is None else product + self.bias)
        return found if self.temperature is None else found / self.temperature

    def map(self, change: Callable[[Tensor], Tensor]) -> Form:
        """The same with a ``change`` of what it has for each token."""
        return self if self.temperature is None else self._replace(temperature=change(self.temperature))

    def with_bias(self, bias: Tensor | None, vocab: VocabShard | None) -> Tensor | None:
        """The whole bias of a head whose own is ``bias``, or that of this rank's rows."""
        if self.bias is None:
            return bias
        more = self.bias if vocab is None else self.bias[vocab.start : vocab.stop]
        return more if bias is None else bias + more

    def detached(self) -> Form:
        bias, temperature = (x if x is None else x.detach() for x in (self.bias, self.temperature))
        return self._replace(bias=bias, temperature=temperature)

    def scaled(self, number: float) -> Form | None:
        """The form of ``number`` times the logits; None where that is not finite."""
        scale, softcap = self.scale * number, self.softcap
        if softcap is not None:
            # number * c * tanh(s u / c), with the sign moved inside: tanh is odd.
            softcap = softcap * abs(number)
            if not 0 < softcap < math.inf:
                return None
        return self._replace(scale=scale, softcap=softcap) if math.isfinite(scale) else None

    def is_same(self, other: Form) -> bool:
        return self[:2] == other[:2] and self.bias is other.bias and self.temperature is other.temperature
