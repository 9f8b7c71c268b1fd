"""Room for the gradients of a head's tensors, by what they are factors of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.scratch import scratch

__all__ = ["HIDDEN_PARTS", "WEIGHT_PARTS", "HeadGradients", "HiddenGradient", "PairGradients"]

HiddenGradient: TypeAlias = Tensor | list[Tensor | None]  # (N, D), or of each depth

HIDDEN_PARTS = ("hidden", "adapter_hidden")
WEIGHT_PARTS = ("weight", "adapter_weight")


class PairGradients:
    """The gradients of a factor pair, hidden states and the rows of a head; None where not needed."""

    def __init__(self, hidden: HiddenGradient | None, weight: Tensor | None) -> None:
        self.hidden = hidden
        self.weight = weight  # (V, D)


class HeadGradients:
    """The gradients of a head's tensors; None where not needed."""

    def __init__(self, parts: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        named: dict[str, Any] = dict(zip(parts, gradients, strict=True))
        self._parts, self._depths = parts, parts.count("hidden")
        if self._depths > 1:
            for hidden in HIDDEN_PARTS:
                depths = [gradient for part, gradient in zip(parts, gradients, strict=True) if part == hidden]
                named[hidden] = depths if any(gradient is not None for gradient in depths) else None
        self.bias: Tensor | None = named.get("bias")  # (V,)
        self.pairs = [PairGradients(named["hidden"], named["weight"])]
        """That of hidden states and weight, and that of an adapter."""
        if "adapter_weight" in parts:
            self.pairs.append(PairGradients(named["adapter_hidden"], named["adapter_weight"]))

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
        gradients: list[Tensor | None] = []
        for part, tensor, need in zip(parts, call.tensors, call.specification.needed, strict=True):
            gradient = None
            if need and part not in skipped:
                gradient = _empty_gradient(tensor, dtype_of(part, tensor), written=part in written)
            gradients.append(gradient)
        return cls(parts, gradients)

    @property
    def needs_hidden(self) -> bool:
        """Whether any hidden states need a gradient."""
        return self.pairs[0].hidden is not None or self.pairs[-1].hidden is not None

    @property
    def sums(self) -> list[Tensor | None]:
        """The gradients that are sums over tokens: of the weight first, then of an adapter and the bias."""
        return [*[pair.weight for pair in self.pairs], self.bias]

    def in_order(self) -> list[Tensor | None]:
        """The gradients in the order of the source's tensors."""
        named: dict[str, Any] = {"bias": self.bias}
        for pair, hidden, weight in zip(self.pairs, HIDDEN_PARTS, WEIGHT_PARTS, strict=False):
            named[hidden], named[weight] = pair.hidden, pair.weight
        if self._depths == 1:
            return [named[part] for part in self._parts]
        depths = {part: iter(named[part] or [None] * self._depths) for part in HIDDEN_PARTS if part in named}
        return [next(depths[part]) if part in depths else named[part] for part in self._parts]


def _empty_gradient(tensor: Tensor, dtype: torch.dtype, *, written: bool) -> Tensor:
    """A gradient of zeros, or uninitialised if a product is ``written`` to all of it."""
    if not written:
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    make = torch.empty if dtype == tensor.dtype else scratch  # a sum that is converted to the gradient
    return make(*tensor.shape, dtype=dtype, device=tensor.device)
