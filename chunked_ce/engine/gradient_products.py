"""From the gradients of logits to those of the source's tensors, block by block.

Each class takes the blocks of a source in order: `LogitGradients` for existing logits, `ChunkProducts` for a head whose
gradient is a sum over chunks of tokens, `VocabularyProducts` for a head whose gradient is written one block of the
vocabulary at a time, from one product over all tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from chunked_ce.devices import rounds_products, unrounded
from chunked_ce.engine.device_filter import DeviceFilter, HeadTerms
from chunked_ce.engine.filtered import GradientFilter
from chunked_ce.engine.head_gradients import HIDDEN_PARTS, WEIGHT_PARTS, HeadGradients, HiddenGradient
from chunked_ce.engine.products import add_product_, wide_product
from chunked_ce.engine.ranks import OneRank
from chunked_ce.engine.sources import Block, Chunk, HeadSource, LogitsSource
from chunked_ce.narrowing import not_none
from chunked_ce.rows import torch_rows
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import RowStatistics

__all__ = [
    "ChunkProducts",
    "Gradient",
    "LogitGradients",
    "TargetGradients",
    "VocabularyProducts",
    "power_of_two",
]

_LARGEST = 2.0**14  # below fp16's 65,504: the sum of a row's gradients may be twice the largest
_LARGEST_EXPONENT = 96  # keeps sums in fp32 within its range
_SCALE_STEP = 8  # powers of two: similar chunks get the same scale


Gradient: TypeAlias = Tensor | HeadTerms  # of a tensor of the source; of a weight perhaps as terms


def power_of_two(most: Tensor) -> Tensor:
    """A power of two between ``most * 2**-8`` and ``most`` (); 1 where ``most`` is 0 or not finite."""
    exponent = (torch.log2(most) / _SCALE_STEP).floor() * _SCALE_STEP
    return torch.exp2(exponent.where(exponent.isfinite(), 0).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


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
        entries, place = torch.unique(self.column[local], return_inverse=True)
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
        return self._total[block.rows] if self._tokens.all_kept else block.gradients

    def column_sums(self) -> None:
        return None

    def targets_of(self, block: Block) -> None:
        return None

    def add(self, chunk: Chunk, block: Block, columns: Any, targets: Any, slopes: RowStatistics) -> None:
        if not self._tokens.all_kept:
            self._tokens.put(self._total, block.rows, block.gradients)

    def finish(self) -> list[Gradient | None]:
        return [self._total]


class VocabularyProducts:
    """The gradients of a head; each row of the weight's gradient is written once."""

    def __init__(self, source: HeadSource, ranks: OneRank, weight_sum: Tensor | None) -> None:
        call = source.call
        self._source, self._ranks = source, ranks
        self._several = not_none(source.plan.entries) < len(source.weight)
        self._row_kernels = call.specification.row_kernels(source.hidden.device)
        self._weight_sum = weight_sum
        self._hidden: list[Tensor | None] = [None, None]  # (n, D) summed over blocks, of each factor pair
        reduced = call.specification.shard is not None and call.specification.shard.input_grad == "complete"
        some = len(source.tokens) > 0

        def dtype_of(part: str, tensor: Tensor) -> torch.dtype:
            return call.reduce_dtype() if reduced and part in HIDDEN_PARTS else tensor.dtype

        written = WEIGHT_PARTS + HIDDEN_PARTS * source.covers_hidden if some else ()
        self.total = HeadGradients.empty(call, dtype_of, written, skipped=() if weight_sum is None else ("weight",))

    def out(self, block: Block) -> Tensor:
        return block.gradients

    def column_sums(self) -> None:
        return None

    def targets_of(self, block: Block) -> TargetGradients | None:
        """Room for the gradients of the targets' logits, if the products leave them out."""
        if not self._several or not self.total.needs_hidden:
            return None
        return _target_gradients(block, self._row_kernels)

    def add(
        self, chunk: Chunk, block: Block, columns: Any, targets: TargetGradients | None, slopes: RowStatistics
    ) -> None:
        """Add the gradients of a block's logits to those of the source's tensors."""
        gradients, pairs, bias = block.gradients, self.total.pairs, self.total.bias
        for at, (pair, x, weight) in enumerate(zip(pairs, chunk.xs, block.weights, strict=True)):
            if pair.hidden is None:
                continue
            total = self._hidden[at]
            first = total is None
            if total is None:
                total = x.new_empty(x.shape, dtype=self._source.plan.hidden_sum)
            add_product_(total, gradients, weight, first=first)
            self._hidden[at] = total if targets is None else targets.add_hidden(total, weight)
        if targets is not None:
            targets.put_back_(gradients)
        for pair, x in zip(pairs, chunk.xs, strict=True):
            if pair.weight is not None:
                add_product_(pair.weight[block.entries], gradients.t(), x, first=True)
        if self._weight_sum is not None:
            add_product_(self._weight_sum[block.entries], gradients.t(), not_none(chunk.x), first=False, apart=True)
        if bias is not None:
            bias[block.entries] = gradients.sum(0, dtype=slopes.log_sum.dtype)

    def finish(self) -> list[Gradient | None]:
        """The gradients of the source's tensors, in their order."""
        for pair, hidden in zip(self.total.pairs, self._hidden, strict=False):
            if hidden is not None and pair.hidden is not None:
                self._source.put(pair.hidden, slice(0, len(hidden)), hidden)
            if pair.hidden is not None:
                pair.hidden = self._ranks.reduce_whole(pair.hidden)
        return [*self.total.in_order()]


class ChunkProducts:
    """The gradients of a head, summed over chunks of tokens, dense or filtered.

    With a filter, the head's gradients start at zero. The weight's gradient is added to the caller's ``weight_sum``,
    if given: at the end, if its chunks need a wider sum.
    """

    def __init__(
        self,
        source: HeadSource,
        ranks: OneRank,
        filter: GradientFilter[Any] | None,
        *,
        keeps_unrounded: bool = False,  # dX and the bias's gradient, until the upstream gradient is known
        reduces_chunks: bool = True,  # dX of each chunk over the ranks; else all of dX at the end
        weight_sum: Tensor | None = None,  # (V, D)
    ) -> None:
        call, sum_dtype = source.call, source.plan.head_sum
        settings, shard = call.specification.settings, call.specification.shard
        # ``weight_sum`` may round no more than a separate sum would.
        fits = weight_sum is not None and torch.promote_types(weight_sum.dtype, sum_dtype) == weight_sum.dtype
        bias_dtype = torch.promote_types(sum_dtype, settings.accumulate_dtype) if keeps_unrounded else sum_dtype
        sums = {"weight": sum_dtype, "bias": bias_dtype, "adapter_weight": settings.wide_dtype}
        reduced = not reduces_chunks and shard is not None and shard.input_grad != "partial"

        def dtype_of(part: str, tensor: Tensor) -> torch.dtype:
            if part not in HIDDEN_PARTS:
                return sums[part]
            if reduced:
                return call.reduce_dtype()
            return unrounded(tensor.dtype) if keeps_unrounded else tensor.dtype

        apart = filter is not None and filter.holds_head
        written: tuple[str, ...] = ()
        if len(source.tokens) > 0:
            written = HIDDEN_PARTS * source.covers_hidden + ("weight",) * (settings.gradient_filter is None)
        self.total = HeadGradients.empty(call, dtype_of, written, skipped=("weight",) if fits or apart else ())
        (main, *_) = self.total.pairs
        self._first = filter is None and main.weight is not None
        if filter is not None and filter.holds_head:
            filter.total = weight_sum if fits and not_none(weight_sum).is_contiguous() else None
        elif weight_sum is not None and main.weight is None:
            main.weight = weight_sum
        self._source, self._ranks, self._filter = source, ranks, filter
        self._reduces_chunks, self._weight_sum = reduces_chunks, weight_sum
        self._row_kernels = call.specification.row_kernels(source.hidden.device)
        self._scale: Tensor | None = None  # () of the current gradients and of the head's sums

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
        if self._scale is not None:
            ratio = (scale / self._scale).float()
            sums = self.total.sums[self._first :]  # the weight's has no value before its first product
            for total in [*sums, *(self._filter.sums if self._filter is not None else ())]:
                if total is not None:
                    self._row_kernels.scale_into(total, ratio, total)
        self._scale = scale

    def out(self, block: Block) -> Tensor:
        return block.gradients

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
        kept = None
        if columns is not None:
            kept = not_none(self._filter).keep(block.gradients, columns, block.column, not_none(slopes))
        found = self.hidden(block, kept, targets) if self.total.needs_hidden else []
        pairs = zip(self.total.pairs, found, strict=False)
        totals = [pair.hidden for pair, part in pairs if part is not None and pair.hidden is not None]
        parts = [part for part in found if part is not None]
        reduction = self._ranks.reduce(chunk, parts) if parts and self._reduces_chunks else None
        self.add_head(chunk, block, kept, targets, weight_later=weight_later)
        if reduction is None:
            for total, part in zip(totals, parts, strict=True):
                self._source.put(total, chunk.rows, part)
            return
        for total, part in zip(totals, reduction.wait(), strict=True):
            self._ranks.put(total, chunk, part)

    def hidden(self, block: Block, kept: Any, targets: TargetGradients | None) -> list[Tensor | None]:
        """The gradients of the chunk's hidden states, (C, D) and (C, r) of an adapter, in the products' dtype or a
        wider one; None for one that is in place already, or not needed."""
        pairs = zip(self.total.pairs, block.weights, strict=True)
        return [self._hidden_of(pair.hidden, weight, block, kept, targets) for pair, weight in pairs]

    def _hidden_of(
        self,
        total: HiddenGradient | None,
        weight: Tensor,
        block: Block,
        kept: Any,  # by the filter, None for all columns
        targets: TargetGradients | None,
    ) -> Tensor | None:
        if total is None:
            return None
        gradients, tokens = block.gradients, self._source.tokens
        if kept is not None:
            part = not_none(self._filter).hidden_gradient(kept)
        elif (
            self._ranks.in_flight == 1
            and tokens.all_kept
            and isinstance(total, Tensor)
            and total.dtype == gradients.dtype
        ):
            torch.mm(gradients, weight, out=total[block.rows])
            return None
        else:
            part = wide_product(gradients, weight)
        if targets is not None:
            part = targets.add_hidden(part, weight)
        return part if self._scale is None else part.to(torch.float32) / self._scale.to(torch.float32)

    def add_head(
        self,
        chunk: Chunk,
        block: Block,
        kept: Any,
        targets: TargetGradients | None,
        *,
        weight_later: bool,
    ) -> None:
        """Add the chunk's share of the gradients of weight, adapter and bias."""
        (main, *adapter), bias, x = self.total.pairs, self.total.bias, not_none(chunk.x)
        if kept is None and self._filter is not None:
            self._filter.add_dense(block.gradients, x)
        if kept is not None:
            not_none(self._filter).add_head_gradients(main.weight, bias, x, kept, self._scale)
            return
        if main.weight is not None:
            apart = main.weight is self._weight_sum
            add_product_(main.weight, block.gradients.t(), x, first=self._first, apart=apart)
            self._first = False
        for pair in adapter:
            if pair.weight is not None:
                add_product_(pair.weight, block.gradients.t(), not_none(chunk.adapter_x), first=False)
        if bias is not None:
            bias.add_(block.gradients.sum(0, dtype=bias.dtype))
        if targets is not None:
            targets.add_head_(None if weight_later else main.weight, bias, x)
            for pair in adapter:
                targets.add_head_(pair.weight, None, not_none(chunk.adapter_x))

    def finish(self) -> list[Gradient | None]:
        """The gradients in the dtypes of their sums, in the order of the source's tensors; None for the weight's if it
        is in ``weight_sum``, and `HeadTerms` for it where the filter holds it."""
        (main, *_), bias = self.total.pairs, self.total.bias
        if self._scale is not None:
            self.set_scale(torch.ones_like(self._scale))
        if self._filter is not None:
            self._filter.finish(main.weight, bias)
        weight: Gradient | None = main.weight
        if isinstance(self._filter, DeviceFilter):
            weight = self._filter.head_gradient(self._weight_sum)
        elif self._weight_sum is not None:
            if main.weight is not self._weight_sum:
                self._weight_sum += not_none(main.weight)
            weight = main.weight = None
        if not self._reduces_chunks:
            for pair in self.total.pairs:
                if pair.hidden is not None:
                    pair.hidden = self._ranks.reduce_whole(pair.hidden)
        parts = self._source.call.specification.parts
        return [weight if part == "weight" else grad for part, grad in zip(parts, self.total.in_order(), strict=True)]


def _target_gradients(block: Block, row_kernels: ModuleType) -> TargetGradients | None:
    """Room for the gradients of the targets' logits, if torch kernels run and the device rounds products."""
    if row_kernels is not torch_rows or not rounds_products(block.column.device.type, not_none(block.weight).dtype):
        return None
    return TargetGradients(block.column, torch.zeros_like(block.column, dtype=torch.float32))
