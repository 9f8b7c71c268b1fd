"""From logit gradients to the gradients of hidden states and head, one chunk after another, densely or filtered."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine import rows as torch_rows
from chunked_ce.engine.columns import ColumnSums
from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.filtered import Filter, Kept
from chunked_ce.engine.products import add_product_, rounds_products, unrounded, wide_product
from chunked_ce.engine.rows import Slopes
from chunked_ce.engine.scratch import scratch

__all__ = ["Backprop", "Gradients", "Targets", "adds_directly", "new_gradients", "new_targets", "power_of_two"]

_LARGEST = 2.0**14  # of fp16's 65,504: a row's gradients may add up to twice the largest
_LARGEST_EXPONENT = 96  # with which sums in fp32 stay in its range
_SCALE_STEP = 8  # powers of two: chunks that are about alike are scaled alike


def power_of_two(most: Tensor) -> Tensor:
    """A power of two of at most ``most`` (), no less than 2**-8 of it; 1 where that is none."""
    exponent = (torch.log2(most) / _SCALE_STEP).floor() * _SCALE_STEP
    return torch.exp2(exponent.where(exponent.isfinite(), 0).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


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


class Targets(NamedTuple):
    """The gradients of the targets' logits, for products without them.

    A target's gradient is the largest of its row, alone as large as the others together, and of tokens that the model
    knows little of it is the same for all. Rounded to bf16, as all others are, it decides the error.
    """

    column: Tensor  # (C,) -1 where it is none of these
    gradient: Tensor  # (C,) fp32, 0 there

    @property
    def here(self) -> Tensor:
        """The tokens whose target is one of these columns."""
        return (self.column >= 0).nonzero().squeeze(1)

    def add_hidden(self, found: Tensor, weight: Tensor) -> Tensor:
        """What products without the targets gave to the hidden states (C, D), with them, in fp32 at least."""
        here = self.here
        parts = self.gradient[here].unsqueeze(1) * weight.index_select(0, self.column[here])
        found = found.to(unrounded(found.dtype))
        return found.index_add_(0, here, parts.to(found.dtype))

    def put_back_(self, gradients: Tensor) -> None:
        """Write the gradients of the targets among the others, (C, V)."""
        here = self.here
        gradients[here, self.column[here]] = self.gradient[here].to(gradients.dtype)

    def add_head_(self, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
        """Add to the gradients of weight (V, D) and bias (V,) what the targets of ``x`` (C, D) give."""
        here = self.here
        column, gradient = self.column[here], self.gradient[here]
        if bias is not None:
            bias.index_add_(0, column, gradient.to(bias.dtype))
        if weight is None:
            return
        if weight.dtype == unrounded(weight.dtype):
            parts = gradient.unsqueeze(1) * x.index_select(0, here)
            weight.index_add_(0, column, parts.to(weight.dtype))
        else:
            words, sums = self.summed_rows(weight, x, x.dtype)
            weight.index_copy_(0, words, sums.to(weight.dtype))

    def summed_rows(self, weight: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The words (k,) that are targets, and their rows (k, D) of ``weight`` with what the targets of ``hidden``
        (C, D) give, which products take in ``dtype``, in fp32."""
        here = self.here
        words, place = self.column[here].unique(return_inverse=True)
        parts = self.gradient[here].unsqueeze(1) * hidden.index_select(0, here).to(dtype)
        return words, weight.index_select(0, words).to(parts.dtype).index_add_(0, place, parts)


def new_targets(
    column: Tensor,  # (C,) -1 where the target is none of these
    dtype: torch.dtype,  # of the products
    row_kernels: ModuleType,
) -> Targets | None:
    """Where the row kernels put the gradients of the targets' logits, where products should go without them."""
    if row_kernels is not torch_rows or not rounds_products(column.device.type, dtype):
        return None
    return Targets(column, torch.zeros_like(column, dtype=torch.float32))


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
        row_kernels: ModuleType,
        weight_sum: Tensor | None = None,  # (V, D)
    ) -> None:
        self.total = total if weight_sum is None or total.weight is not None else total._replace(weight=weight_sum)
        self._weight_sum = weight_sum
        self._weight = weight
        self._filter = filter
        self._row_kernels = row_kernels
        self._scale: Tensor | None = None  # () of the gradients at hand, and of the head's sums
        self._first = filter is None and total.weight is not None

    @property
    def largest_gradient(self) -> float:
        """What gradients of logits may be as large as, where they are scaled: products with fp16 results that the
        filter forms must stay in its range."""
        return _LARGEST if self._filter is None else 1.0

    def set_scale(self, scale: Tensor | None) -> None:
        """The logit gradients to come are ``scale`` (), a power of two, times the gradients. None is what it was,
        1 at first."""
        if scale is None:
            return
        if self._scale is not None and not self._first:
            ratio = (scale / self._scale).float()
            for total in self.total[1:]:
                if total is not None:
                    self._row_kernels.scale_into(total, ratio, total)
        self._scale = scale

    def new_columns(self) -> ColumnSums | None:
        """What the row kernels have to fill for `keep`."""
        return None if self._filter is None else self._filter.new_columns()

    def new_targets(self, column: Tensor) -> Targets | None:
        """`new_targets` for a chunk whose targets are the columns ``column`` (C,)."""
        return None if self._filter is not None else new_targets(column, self._weight.dtype, self._row_kernels)

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
        targets: Targets | None = None,
        out: Tensor | None = None,  # (C, D) in the products' dtype
    ) -> Tensor:
        """The gradient of the chunk's hidden states, (C, D), in the products' dtype or in a wider one."""
        if kept is not None:
            found = self._filter.hidden_gradient(kept)
        elif out is not None:
            return torch.mm(gradients, self._weight, out=out)
        else:
            found = wide_product(gradients, self._weight)
        if targets is not None:
            found = targets.add_hidden(found, self._weight)
        return found if self._scale is None else found.to(torch.float32) / self._scale.to(torch.float32)

    def put_hidden(
        self,
        tokens: CountedTokens,
        rows: slice,
        gradients: Tensor,  # (C, V)
        kept: Kept | None,
        targets: Targets | None = None,
    ) -> None:
        """Write the gradient of the hidden states of the tokens ``rows``."""
        total = self.total.hidden
        if total is None:
            return
        if kept is None and tokens.all_kept and total.dtype == gradients.dtype:
            self.hidden(gradients, kept, out=total[rows])
        else:
            tokens.put(total, rows, self.hidden(gradients, kept, targets))

    def add_head(
        self,
        x: Tensor,  # (C, D)
        gradients: Tensor,  # (C, V)
        kept: Kept | None,
        targets: Targets | None = None,
        *,
        weight_later: bool = False,
    ) -> None:
        """Add the chunk's share of the gradients of weight and bias; with ``weight_later`` the targets' not yet to the
        weight's."""
        weight, bias = self.total.weight, self.total.bias
        if kept is not None:
            self._filter.add_head_gradients(weight, bias, x, kept, self._scale)
            return
        if weight is not None:
            add_product_(weight, gradients.t(), x, first=self._first, apart=weight is self._weight_sum)
            self._first = False
        if bias is not None:
            bias.add_(gradients.sum(0, dtype=bias.dtype))
        if targets is not None:
            targets.add_head_(None if weight_later else weight, bias, x)

    def finish(self) -> Gradients:
        """Add to weight and bias what was left for the end. The gradients, without one that is in ``weight_sum``."""
        weight = self.total.weight
        if self._scale is not None:
            self.set_scale(torch.ones_like(self._scale))
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
    bias_dtype: torch.dtype | None = None,  # None: that of the head
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
        new(bias, needed[2], bias_dtype or head_dtype, False),
    )
