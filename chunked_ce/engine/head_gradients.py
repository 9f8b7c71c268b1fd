"""Room for the gradients of a head's tensors, by what they are factors of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.scratch import scratch

__all__ = ["HIDDEN_PARTS", "WEIGHT_PARTS", "HeadGradients", "PairGradients"]

HIDDEN_PARTS = ("hidden", "adapter_hidden")
WEIGHT_PARTS = ("weight", "adapter_weight")


class PairGradients:
    """The gradients of a factor pair, hidden states and the rows of a head; None where not needed."""

    def __init__(self, hiddens: list[Tensor | None], weight: Tensor | None) -> None:
        self.weight = weight  # (V, D)
        self.hidden: Tensor | list[Tensor | None] | None = hiddens[0]  # (N, D), or of each depth
        if len(hiddens) > 1:
            self.hidden = hiddens if any(hidden is not None for hidden in hiddens) else None


class HeadGradients:
    """The gradients of a head's tensors; None where not needed."""

    def __init__(self, parts: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        named: dict[str, list[Tensor | None]] = {}
        for part, gradient in zip(parts, gradients, strict=True):
            named.setdefault(part, []).append(gradient)
        self._parts = parts
        self.bias = named.get("bias", [None])[0]  # (V,)
        self.pairs = [PairGradients(named["hidden"], *named["weight"])]
        """That of hidden states and weight, and that of an adapter."""
        if "adapter_weight" in named:
            self.pairs.append(PairGradients(named["adapter_hidden"], *named["adapter_weight"]))

    @classmethod
    def empty(
        cls,
        call: Call,
        dtype_of: Callable[[str, Tensor], torch.dtype],  # of the gradient of a part
        written: Collection[str],  # parts of whose gradients a product writes all
        skipped: Collection[str] = (),  # parts whose gradients go elsewhere
    ) -> HeadGradients:
        """Gradients of zeros, or uninitialised where they are ``written``."""
        parts = call.specification.parts
        gradients = [
            _empty_gradient(tensor, dtype_of(part, tensor), written=part in written)
            if need and part not in skipped
            else None
            for part, tensor, need in zip(parts, call.tensors, call.specification.needed, strict=True)
        ]
        return cls(parts, gradients)

    @property
    def needs_hidden(self) -> bool:
        """Whether any hidden states need a gradient."""
        return any(pair.hidden is not None for pair in self.pairs)

    @property
    def sums(self) -> list[Tensor | None]:
        """The gradients that are sums over tokens: of the weight first, then of an adapter and the bias."""
        return [*[pair.weight for pair in self.pairs], self.bias]

    def in_order(self) -> list[Tensor | None]:
        """The gradients in the order of the source's tensors."""
        named = {"bias": [self.bias]}
        for pair, hidden, weight in zip(self.pairs, HIDDEN_PARTS, WEIGHT_PARTS, strict=False):
            depths = self._parts.count(hidden)
            named[hidden] = list(pair.hidden or [None] * depths) if depths > 1 else [pair.hidden]
            named[weight] = [pair.weight]
        return [named[part].pop(0) for part in self._parts]


def _empty_gradient(tensor: Tensor, dtype: torch.dtype, *, written: bool) -> Tensor:
    """A gradient of zeros, or uninitialised if a product is ``written`` to all of it."""
    if not written:
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    make = torch.empty if dtype == tensor.dtype else scratch  # a sum that is converted to the gradient
    return make(*tensor.shape, dtype=dtype, device=tensor.device)
