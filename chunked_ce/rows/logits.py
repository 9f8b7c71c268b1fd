"""How logits are computed from products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Logits"]


class Logits(NamedTuple):
    """How logits are computed from the product of hidden states and head."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor, temperature: Tensor | None = None) -> Tensor:
        """``scale * product``, then ``softcap * tanh(. / softcap)``, over the temperature (n,) of each row (n, V)."""
        logits = product if self.scale == 1.0 else product * self.scale
        logits = logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
        return logits if temperature is None else logits / temperature.unsqueeze(-1)

    def apply_(self, product: Tensor, temperature: Tensor | None = None) -> Tensor:
        """The same, in the product's memory."""
        if self.softcap is not None:
            product.mul_(self.scale).div_(self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            product.mul_(self.scale)
        return product if temperature is None else product.div_(temperature.unsqueeze(-1))
