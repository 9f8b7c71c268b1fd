"""From logit gradients to the gradients of hidden states and head, one chunk after another, densely or filtered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine.columns import ColumnSums
from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.filtered import Filter, Kept
from chunked_ce.engine.products import add_product_
from chunked_ce.engine.rows import Slopes
from chunked_ce.engine.scratch import scratch

__all__ = ["Backprop", "Gradients", "adds_directly", "new_gradients"]


class Gradients(NamedTuple):
    """Gradients in the shapes of their tensors, None where nobody needs one."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    def as_dtype_of(self, weight: Tensor, bias: Tensor | None) -> Gradients:
        """The same with the head's gradients in the dtypes of the head."""
        return Gradients(
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None else self.bias.to(bias.dtype),
        )


def adds_directly(weight_sum: Tensor | None, sum_dtype: torch.dtype) -> bool:
    """Whether chunks may be added to ``weight_sum``: not where that would round more than a sum in ``sum_dtype``."""
    return weight_sum is not None and torch.promote_types(weight_sum.dtype, sum_dtype) == weight_sum.dtype


class Backprop:
    """The two products that a chunk's logit gradients enter, added to ``total``.

    With a filter the gradients of the head have to be zero before. That of the weight is added to ``weight_sum``,
    which the caller has, where there is one: at the end if ``total`` has a sum of its own.
    """

    def __init__(
        self,
        total: Gradients,
        weight: Tensor,  # (V, D) in the products' dtype
        filter: Filter | None,
        weight_sum: Tensor | None = None,  # (V, D)
    ) -> None:
        self.total = total if weight_sum is None or total.weight is not None else total._replace(weight=weight_sum)
        self._weight_sum = weight_sum
        self._weight = weight
        self._filter = filter
        self._first = filter is None and total.weight is not None

    def new_columns(self) -> ColumnSums | None:
        """What the row kernels have to fill for `keep`."""
        return None if self._filter is None else self._filter.new_columns()

    def keep(
        self,
        gradients: Tensor,  # (C, V)
        columns: ColumnSums | None,
        target: Tensor,  # (C,) a column, -1 where it is none of these
        slopes: Slopes,  # (C,) each
    ) -> Kept | None:
        """Which columns the products run over; None is all."""
        return None if columns is None else self._filter.keep(gradients, columns, target, slopes)

    def hidden(
        self,
        gradients: Tensor,  # (C, V)
        kept: Kept | None,
        out: Tensor | None = None,  # (C, D)
    ) -> Tensor:
        """The gradient of the chunk's hidden states, (C, D)."""
        if kept is None:
            return torch.mm(gradients, self._weight, out=out)
        found = self._filter.hidden_gradient(kept)
        return found if out is None else out.copy_(found)

    def put_hidden(self, tokens: CountedTokens, rows: slice, gradients: Tensor, kept: Kept | None) -> None:
        """Write the gradient of the hidden states of the tokens ``rows``."""
        total = self.total.hidden
        if total is None:
            return
        if tokens.all_kept and total.dtype == gradients.dtype:
            self.hidden(gradients, kept, out=total[rows])
        else:
            tokens.put(total, rows, self.hidden(gradients, kept))

    def add_head(
        self,
        x: Tensor,  # (C, D)
        gradients: Tensor,  # (C, V)
        kept: Kept | None,
    ) -> None:
        """Add the chunk's share of the gradients of weight and bias."""
        weight, bias = self.total.weight, self.total.bias
        if kept is not None:
            self._filter.add_head_gradients(weight, bias, x, kept)
            return
        if weight is not None:
            add_product_(weight, gradients.t(), x, first=self._first)
            self._first = False
        if bias is not None:
            bias.add_(gradients.sum(0, dtype=bias.dtype))

    def finish(self) -> Gradients:
        """Add to weight and bias what was left for the end. The gradients, without one that is in ``weight_sum``."""
        weight = self.total.weight
        if self._filter is not None:
            self._filter.finish(weight, self.total.bias)
        if self._weight_sum is None:
            return self.total
        if weight is not self._weight_sum:
            self._weight_sum += weight
        return self.total._replace(weight=None)


def new_gradients(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: CountedTokens,
    needed: tuple[bool, bool, bool],
    head_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype | None = None,
    zero_head: bool = False,
) -> Gradients:
    """Gradients to be written: zero already where no product will be; a dtype of None is each tensor's own."""

    def new(tensor: Tensor | None, need: bool, dtype: torch.dtype | None, written: bool) -> Tensor | None:
        if not need:
            return None
        dtype = dtype or tensor.dtype
        if not written:
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        make = torch.empty if dtype == tensor.dtype else scratch  # a sum that is converted to the gradient
        return make(*tensor.shape, dtype=dtype, device=tensor.device)

    some = len(tokens) > 0
    return Gradients(
        new(hidden, needed[0], hidden_dtype, some and tokens.all_kept),
        new(weight, needed[1], head_dtype, some and not zero_head),
        new(bias, needed[2], head_dtype, False),
    )
