"""From the gradients of logits to those of the source's tensors, block by block.

Each class takes the blocks of a source in order: `LogitGradients` for existing logits, `ChunkProducts` for a head whose
gradient is a sum over chunks of tokens, `VocabularyProducts` for a head whose gradient is written one block of the
vocabulary at a time, from one product over all tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.devices import rounds_products, unrounded
from chunked_ce.engine.filtered import Filter, FilteredChunk
from chunked_ce.engine.products import add_product_, wide_product
from chunked_ce.engine.ranks import OneRank
from chunked_ce.engine.scratch import scratch
from chunked_ce.engine.sources import Block, Chunk, HeadSource, LogitsSource
from chunked_ce.rows import torch_rows
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import RowStatistics

__all__ = [
    "ChunkProducts",
    "Gradients",
    "LogitGradients",
    "TargetGradients",
    "VocabularyProducts",
    "power_of_two",
]

_LARGEST = 2.0**14  # below fp16's 65,504: the sum of a row's gradients may be twice the largest
_LARGEST_EXPONENT = 96  # keeps sums in fp32 within its range
_SCALE_STEP = 8  # powers of two: similar chunks get the same scale


def power_of_two(most: Tensor) -> Tensor:
    """A power of two between ``most * 2**-8`` and ``most`` (); 1 where ``most`` is 0 or not finite."""
    exponent = (torch.log2(most) / _SCALE_STEP).floor() * _SCALE_STEP
    return torch.exp2(exponent.where(exponent.isfinite(), 0).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


class Gradients(NamedTuple):
    """Gradients of a head's tensors, None where not needed."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None = None  # (V,)


class TargetGradients(NamedTuple):
    """The gradients of the targets' logits, for products that leave them out.

    A target's gradient is the largest of its row, as large as the others together, and the same for all tokens that the
    model predicts poorly. Rounded to bf16 like the others, it would dominate the error.
    """

    column: Tensor  # (C,) -1 where the target is in no column
    gradient: Tensor  # (C,) fp32, 0 where column is -1

    @property
    def local(self) -> Tensor:
        """The tokens whose target is one of these columns."""
        return (self.column >= 0).nonzero().squeeze(1)

    def add_hidden(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the hidden states (C, D) with the terms of the targets added, in fp32 at least."""
        local = self.local
        parts = self.gradient[local].unsqueeze(1) * weight.index_select(0, self.column[local])
        hidden = hidden.to(unrounded(hidden.dtype))
        return hidden.index_add_(0, local, parts.to(hidden.dtype))

    def put_back_(self, gradients: Tensor) -> None:
        """Write the targets' gradients into those of all logits, (C, V)."""
        local = self.local
        gradients[local, self.column[local]] = self.gradient[local].to(gradients.dtype)

    def add_head_(self, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
        """Add the targets' terms, for hidden states ``x`` (C, D), to the gradients of weight (V, D) and bias (V,)."""
        local = self.local
        column, gradient = self.column[local], self.gradient[local]
        if bias is not None:
            bias.index_add_(0, column, gradient.to(bias.dtype))
        if weight is None:
            return
        if weight.dtype == unrounded(weight.dtype):
            parts = gradient.unsqueeze(1) * x.index_select(0, local)
            weight.index_add_(0, column, parts.to(weight.dtype))
        else:
            entries, sums = self.summed_rows(weight, x, x.dtype)
            weight.index_copy_(0, entries, sums.to(weight.dtype))

    def summed_rows(self, weight: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The vocabulary entries (k,) that are targets, and their rows (k, D) of ``weight`` in fp32 plus the targets'
        terms, for hidden states ``hidden`` (C, D) cast to ``dtype``."""
        local = self.local
        entries, place = self.column[local].unique(return_inverse=True)
        parts = self.gradient[local].unsqueeze(1) * hidden.index_select(0, local).to(dtype)
        return entries, weight.index_select(0, entries).to(parts.dtype).index_add_(0, place, parts)


class LogitGradients:
    """The gradient of existing logits, (N, V)."""

    def __init__(self, source: LogitsSource) -> None:
        (logits,) = source.call.tensors
        self._tokens = source.tokens
        self._total = torch.empty_like(logits) if source.tokens.all_kept else torch.zeros_like(logits)

    def out(self, block: Block) -> Tensor:
        """The tensor to write the gradients of a block's logits to, (C, B)."""
        return self._total[block.rows] if self._tokens.all_kept else block.products

    def column_sums(self) -> None:
        return None

    def targets_of(self, block: Block) -> None:
        return None

    def add(self, chunk: Chunk, block: Block, columns: None, targets: None, slopes: RowStatistics) -> None:
        if not self._tokens.all_kept:
            self._tokens.put(self._total, block.rows, block.products)

    def finish(self) -> list[Tensor]:
        return [self._total]


class VocabularyProducts:
    """The gradients of a head; each row of the weight's gradient is written once."""

    def __init__(self, source: HeadSource, ranks: OneRank, needed: tuple[bool, ...], weight_sum: Tensor | None) -> None:
        needs_hidden, needs_weight, *needs_bias = needed
        call = source.call
        self._source, self._ranks = source, ranks
        self._several = source.plan.entries < len(source.weight)
        self._row_kernels = call.specification.row_kernels(source.hidden.device)
        self._weight_sum = weight_sum
        self._hidden: Tensor | None = None  # (n, D) summed over blocks
        reduced = call.specification.shard is not None and call.specification.shard.input_grad == "complete"
        hidden_dtype = call.reduce_dtype() if reduced else source.hidden.dtype
        some = len(source.tokens) > 0
        self.total = Gradients(
            _empty_gradient(source.hidden, needs_hidden, hidden_dtype, written=some and source.tokens.all_kept),
            _empty_gradient(source.weight, needs_weight and weight_sum is None, source.weight.dtype, written=some),
            _empty_gradient(source.bias, any(needs_bias), None, written=False),
        )

    def out(self, block: Block) -> Tensor:
        return block.products

    def column_sums(self) -> None:
        return None

    def targets_of(self, block: Block) -> TargetGradients | None:
        """Room for the gradients of the targets' logits, if the products leave them out."""
        if not self._several or self.total.hidden is None:
            return None
        return _target_gradients(block, self._row_kernels)

    def add(
        self, chunk: Chunk, block: Block, columns: None, targets: TargetGradients | None, slopes: RowStatistics
    ) -> None:
        """Add the gradients of a block's logits to those of the source's tensors."""
        hidden, weight, bias = self.total
        gradients = block.products
        if hidden is not None:
            first = self._hidden is None
            if first:
                self._hidden = chunk.x.new_empty(chunk.x.shape, dtype=self._source.plan.hidden_sum)
            add_product_(self._hidden, gradients, block.weight, first=first)
        if targets is not None:
            self._hidden = targets.add_hidden(self._hidden, block.weight)
            targets.put_back_(gradients)
        if weight is not None:
            add_product_(weight[block.entries], gradients.t(), chunk.x, first=True)
        elif self._weight_sum is not None:
            add_product_(self._weight_sum[block.entries], gradients.t(), chunk.x, first=False, apart=True)
        if bias is not None:
            bias[block.entries] = gradients.sum(0, dtype=slopes.log_sum.dtype)

    def finish(self) -> Gradients:
        hidden = self.total.hidden
        if hidden is None:
            return self.total
        if self._hidden is not None:
            self._source.tokens.put(hidden, slice(None), self._hidden)
        return self.total._replace(hidden=self._ranks.reduce_whole(hidden).to(self._source.hidden.dtype))


class ChunkProducts:
    """The gradients of a head, summed over chunks of tokens, dense or filtered.

    With a filter, the head's gradients start at zero. The weight's gradient is added to the caller's ``weight_sum``,
    if given: at the end, if its chunks need a wider sum.
    """

    def __init__(
        self,
        source: HeadSource,
        ranks: OneRank,
        needed: tuple[bool, ...],
        filter: Filter | None,
        *,
        keeps_unrounded: bool = False,  # dX and the bias's gradient, until the upstream gradient is known
        reduces_chunks: bool = True,  # dX of each chunk over the ranks; else all of dX at the end
        weight_sum: Tensor | None = None,  # (V, D)
    ) -> None:
        needs_hidden, needs_weight, *needs_bias = needed
        settings, sum_dtype = source.call.specification.settings, source.plan.head_sum
        if weight_sum is not None and torch.promote_types(weight_sum.dtype, sum_dtype) == weight_sum.dtype:
            needs_weight = False  # ``weight_sum`` rounds no more than a separate sum would
        hidden_dtype = unrounded(source.hidden.dtype) if keeps_unrounded else source.hidden.dtype
        if not reduces_chunks and source.call.specification.shard is not None:
            partial = source.call.specification.shard.input_grad == "partial"
            hidden_dtype = hidden_dtype if partial else source.call.reduce_dtype()
        bias_dtype = torch.promote_types(sum_dtype, settings.accumulate_dtype) if keeps_unrounded else sum_dtype
        some = len(source.tokens) > 0
        total = Gradients(
            _empty_gradient(source.hidden, needs_hidden, hidden_dtype, written=some and source.tokens.all_kept),
            _empty_gradient(source.weight, needs_weight, sum_dtype, written=some and settings.gradient_filter is None),
            _empty_gradient(source.bias, any(needs_bias), bias_dtype, written=False),
        )
        self.total = total if weight_sum is None or total.weight is not None else total._replace(weight=weight_sum)
        self._source, self._ranks, self._filter = source, ranks, filter
        self._reduces_chunks, self._weight_sum = reduces_chunks, weight_sum
        self._row_kernels = source.call.specification.row_kernels(source.hidden.device)
        self._scale: Tensor | None = None  # () of the current gradients and of the head's sums
        self._first = filter is None and total.weight is not None

    @property
    def is_filtered(self) -> bool:
        return self._filter is not None

    @property
    def largest_gradient(self) -> float:
        """The largest scaled gradient of a logit: the filter's products have fp16 results, which must stay in range."""
        return _LARGEST if self._filter is None else 1.0

    def set_scale(self, scale: Tensor | None) -> None:
        """The next logit gradients are multiplied by ``scale`` (), a power of two; None keeps the last, at first 1."""
        if scale is None:
            return
        if self._scale is not None and not self._first:
            ratio = (scale / self._scale).float()
            for total in self.total[1:]:
                if total is not None:
                    self._row_kernels.scale_into(total, ratio, total)
        self._scale = scale

    def out(self, block: Block) -> Tensor:
        return block.products

    def column_sums(self) -> ColumnSums | None:
        """The column sums that the row kernels fill for the filter."""
        return None if self._filter is None else self._filter.column_sums()

    def targets_of(self, block: Block) -> TargetGradients | None:
        """Room for the gradients of the targets' logits, if the products leave them out."""
        return None if self._filter is not None else _target_gradients(block, self._row_kernels)

    def add(
        self,
        chunk: Chunk,
        block: Block,
        columns: ColumnSums | None,
        targets: TargetGradients | None,
        slopes: RowStatistics | None,  # (C,) each, for the filter
        *,
        weight_later: bool = False,
    ) -> None:
        """Add the gradients of a chunk's logits; ``weight_later`` leaves the targets' terms out of the weight's."""
        kept = None if columns is None else self._filter.keep(block.products, columns, block.column, slopes)
        reduction = None
        if self.total.hidden is not None:
            part = self.hidden(block, kept, targets)
            if part is not None:
                reduction = self._ranks.reduce(chunk, part) if self._reduces_chunks else part
        self.add_head(chunk, block, kept, targets, weight_later=weight_later)
        if not self._reduces_chunks and reduction is not None:
            self._source.tokens.put(self.total.hidden, chunk.rows, reduction)
        elif reduction is not None:
            self._ranks.put(self.total.hidden, chunk, reduction.wait())

    def hidden(self, block: Block, kept: FilteredChunk | None, targets: TargetGradients | None) -> Tensor | None:
        """The gradient of the chunk's hidden states, (C, D), in the products' dtype or a wider one; None if it is in
        place already."""
        gradients, total = block.products, self.total.hidden
        if kept is not None:
            part = self._filter.hidden_gradient(kept)
        elif self._ranks.in_flight == 1 and self._source.tokens.all_kept and total.dtype == gradients.dtype:
            torch.mm(gradients, block.weight, out=total[block.rows])
            return None
        else:
            part = wide_product(gradients, block.weight)
        if targets is not None:
            part = targets.add_hidden(part, block.weight)
        return part if self._scale is None else part.to(torch.float32) / self._scale.to(torch.float32)

    def add_head(
        self,
        chunk: Chunk,
        block: Block,
        kept: FilteredChunk | None,
        targets: TargetGradients | None,
        *,
        weight_later: bool,
    ) -> None:
        """Add the chunk's share of the gradients of weight and bias."""
        weight, bias = self.total.weight, self.total.bias
        if kept is not None:
            self._filter.add_head_gradients(weight, bias, chunk.x, kept, self._scale)
            return
        if weight is not None:
            apart = weight is self._weight_sum
            add_product_(weight, block.products.t(), chunk.x, first=self._first, apart=apart)
            self._first = False
        if bias is not None:
            bias.add_(block.products.sum(0, dtype=bias.dtype))
        if targets is not None:
            targets.add_head_(None if weight_later else weight, bias, chunk.x)

    def finish(self) -> Gradients:
        """The gradients in the dtypes of their sums; None for one that is in ``weight_sum``."""
        hidden, weight, bias = self.total
        if self._scale is not None:
            self.set_scale(torch.ones_like(self._scale))
        if self._filter is not None:
            self._filter.finish(weight, bias)
        if self._weight_sum is not None:
            if weight is not self._weight_sum:
                self._weight_sum += weight
            weight = None
        if hidden is not None and not self._reduces_chunks:
            hidden = self._ranks.reduce_whole(hidden).to(self._source.hidden.dtype)
        return Gradients(hidden, weight, bias)


def _target_gradients(block: Block, row_kernels: ModuleType) -> TargetGradients | None:
    """Room for the gradients of the targets' logits, if torch kernels run and the device rounds products."""
    if row_kernels is not torch_rows or not rounds_products(block.column.device.type, block.weight.dtype):
        return None
    return TargetGradients(block.column, torch.zeros_like(block.column, dtype=torch.float32))


def _empty_gradient(tensor: Tensor | None, need: bool, dtype: torch.dtype | None, *, written: bool) -> Tensor | None:
    """A gradient in ``dtype`` (None: the tensor's), of zeros unless a product is ``written`` to all of it."""
    if not need:
        return None
    dtype = dtype or tensor.dtype
    if not written:
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    make = torch.empty if dtype == tensor.dtype else scratch  # a sum that is converted to the gradient
    return make(*tensor.shape, dtype=dtype, device=tensor.device)
