"""Heads with a low-rank adapter, for the tests: the problem, its reference, and the plain code that it replaces."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import linear_cross_entropy
from tests.cases import Problem, array, arrays, problem
from tests.reference import linear_rows

NAMES = ("input", "linear_weight", "linear_bias", "linear_adapter[0]", "linear_adapter[1]")


@dataclass(frozen=True)
class Adapted:
    base: Problem
    hidden: Tensor  # (N, r)
    weight: Tensor  # (V, r)

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = self.base.hidden, self.base.head, self.base.bias, self.hidden, self.weight
        return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]

    def trained(self, *names: str) -> Adapted:
        """The same numbers in new leaves, of which these need gradients."""
        fields = dict(zip(NAMES, ("hidden", "head", "bias"), strict=False))
        new = {name: x.detach().clone().requires_grad_(name in names) for name, x in self.tensors.items()}
        base = replace(self.base, **{field: new[name] for name, field in fields.items() if name in new})
        return Adapted(base, *(new[name] for name in NAMES[3:]))

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states (N, D + r) and weight (V, D + r) whose product is that of head and adapter together."""
        pairs = (self.base.hidden, self.hidden), (self.base.head, self.weight)
        return tuple(np.concatenate([array(part) for part in pair], 1) for pair in pairs)

    def rows(self, **terms):
        bias = None if self.base.bias is None else array(self.base.bias)
        options = {"bias": bias, "ignore_index": self.base.ignore_index}
        return linear_rows(*self.factors, array(self.base.target), **options, **arrays(terms))

    def reference_gradients(self, rows, of: str, upstream: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Value and scale of each gradient, by name."""
        hidden, weight, bias = rows.gradients(of, *self.factors, upstream)
        width = self.base.hidden.shape[1]
        found = {"linear_bias": bias}
        for names, pair in ((NAMES[0::3], hidden), (NAMES[1::3], weight)):
            found |= {names[0]: tuple(x[:, :width] for x in pair), names[1]: tuple(x[:, width:] for x in pair)}
        return found

    def keywords(self):
        return self.base.keywords() | {"linear_adapter": (self.hidden, self.weight)}

    def loss(self, **options):
        return linear_cross_entropy(self.base.hidden, self.base.head, self.base.target, **self.keywords(), **options)

    def plain_logits(self) -> Tensor:
        """The logits of a head with an adapter that is not merged, in their own dtype."""
        return F.linear(self.base.hidden, self.base.head, self.base.bias) + F.linear(self.hidden, self.weight)


def adapted(n, d, r, vocab, *, dtype=torch.float32, seed=0, **options) -> Adapted:
    g = torch.Generator().manual_seed(seed + 1000)
    base = problem(n, d, vocab, dtype=dtype, seed=seed, **options)
    hidden, weight = (torch.randn(size, r, generator=g, dtype=torch.float64) for size in (n, vocab))
    return Adapted(base, hidden.to(dtype).requires_grad_(), (0.5 * r**-0.5 * weight).to(dtype).requires_grad_())
