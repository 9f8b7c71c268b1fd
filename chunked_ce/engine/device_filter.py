"""The gradient filter of `chunked_ce.engine.filtered` on an accelerator: few passes, few launches, one wait per chunk.

The host decides by two numbers of a chunk: how many columns it keeps, and whether its products are dense. They depend
on the compacted gradients, so the compaction starts before the host knows them, with room for more columns than a
trained model keeps. While they travel, the device multiplies the head by the tail.

The gradient of the head has no (V, D) sum: each chunk leaves its kept rows, and one pass at the end adds them to the
tails, multiplies by the upstream gradient, and writes each row once.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chunked_ce import devices
from chunked_ce.engine.filtered import MOST_DROPPED_OF_A_TOKEN, MOST_KEPT, GradientFilter, groups_of
from chunked_ce.engine.products import add_product_, wide_product
from chunked_ce.engine.scratch import scratch
from chunked_ce.engine.specification import Specification
from chunked_ce.narrowing import not_none
from chunked_ce.plan import GROUPS, ROOM_SHARE
from chunked_ce.rows import torch_rows
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import RowStatistics
from chunked_ce.rows.torch_filter import padded

__all__ = ["CompactChunk", "DeviceFilter", "HeadTerms", "filter_kernels"]

_MORE = 1.125  # room for as many times the most columns that a chunk of this loss has kept so far
_MOST_PARTS = 0.5  # of the vocabulary: rows that chunks leave before they are added up


class CompactChunk(NamedTuple):
    """The factors of a chunk's products: kept columns and a tail, or all columns and the term of label smoothing."""

    columns: Tensor  # (C, width): K kept ones, three times the tail's k, zeros; or (C, V)
    place: Tensor | None  # (V,) int32, the place of a kept column; None for all columns
    num_kept: int  # K
    left: Tensor  # (C, k) fp32
    right: Tensor  # (V, k) fp32
    tail: Tensor | None  # right.T @ weight, (k, D) fp32; None if the hidden states need no gradient


class HeadTerms(NamedTuple):
    """The gradient of the head's weight as the terms of a sum, which is formed once its factor is known."""

    kernels: ModuleType
    total: Tensor | None  # (V, D)
    parts: Tensor  # (R, D) fp32, kept rows of all chunks
    places: Tensor  # (chunks, V) int32, in the parts
    right: Tensor  # (V, k) fp32
    left: Tensor  # (k, D) fp32

    def finished(self, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
        """``factor`` () times the sum, (V, D) in ``dtype``, rounded once."""
        out = self.left.new_empty(len(self.right), self.left.shape[1], dtype=dtype)
        finished: Tensor = self.kernels.finished(out, *self[1:], factor)
        return finished

    def to(self, dtype: torch.dtype) -> Tensor:
        return self.finished(dtype)


class DeviceFilter(GradientFilter[CompactChunk]):
    """The filter whose host learns of a chunk's kept columns once they are compacted."""

    holds_head = True

    def __init__(
        self,
        weight: Tensor,  # (V, D) in the products' dtype
        class_weight: Tensor | None,  # (V,)
        eps: float,
        share: float = 1.0,  # of the whole vocabulary that this rank holds
        *,
        kernels: ModuleType,  # `chunked_ce.rows.triton_filter`, or its twin
        num_chunks: int,  # about
        needs_hidden: bool,
        head_sum: torch.dtype | None,  # of the weight's gradient over dense chunks; None: it needs none
    ) -> None:
        super().__init__(weight, class_weight, eps, share)
        self._kernels, self._num_chunks = kernels, num_chunks
        self._needs_hidden, self._head_sum = needs_hidden, head_sum
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        self._room = padded(math.ceil(ROOM_SHARE * len(weight)) + 3 * (GROUPS + 1))
        self._scale = 2.0 ** (len(weight).bit_length() // 2)  # of the tail's factors, which fit in fp16 with it
        self._parts = weight.new_empty(0, weight.shape[1], dtype=self._wide)  # (R, D)
        self._used = 0  # rows of the parts
        self._places: list[Tensor] = []  # (V,) of each filtered chunk, in the parts

    def keep(
        self,
        gradients: Tensor,  # (C, V) without label smoothing
        columns: ColumnSums,
        target: Tensor,  # (C,) a column, -1 where it is in another shard
        slopes: RowStatistics,  # (C,) each
    ) -> CompactChunk | None:
        """The factors of the products. None means all columns and no tail, as for an untrained model."""
        if gradients.numel() == 0:
            return None
        size = slopes.log_sum.abs()
        place, num_kept, skip, right = self._choose(columns, target, size)
        smoothing = None if slopes.weighted is None else self._smoothing(slopes.weighted)
        if smoothing is not None:
            right = torch.cat([right, smoothing[1]], 1)

        def compact() -> tuple[Tensor, Tensor]:
            picked, left = self._kernels.compact_at(gradients, place, skip, GROUPS, self._room)
            whole = left if smoothing is None else torch.cat([left, smoothing[0]], 1)
            self._kernels.tail_columns_(picked, whole, num_kept, self._scale)
            return picked, whole

        picked, left = compact()
        is_even = (left[:, :GROUPS].norm(p=1, dim=1) <= MOST_DROPPED_OF_A_TOKEN * size).all()
        numbers = devices.start_reading(torch.stack([num_kept, skip, is_even.int()]))
        tail = None
        if self._needs_hidden:  # a dense chunk needs that of the smoothing
            tail = self._kernels.summed_tail(right, self._weight, skip if smoothing is None else skip * 0)
        count, skipped, is_even = numbers().tolist()
        if skipped or not is_even:
            if smoothing is None:
                return None
            return CompactChunk(gradients, None, 0, *smoothing, None if tail is None else tail[GROUPS:])
        width = padded(count + 3 * left.shape[1])
        if width > self._room:
            self._room = width
            picked, left = compact()
        if self._num_chunks > 1:
            self._room = max(self._room, padded(math.ceil(_MORE * width)))
        return CompactChunk(picked[:, :width], place, count, left, right, tail)

    def _choose(
        self,
        columns: ColumnSums,
        target: Tensor,  # (C,)
        size: Tensor,  # (C,)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The place (V,) of each column, the number () of kept ones, whether to skip them, () not 0, and the tail's
        columns (V, g), without a wait."""
        vocab_size = len(self._weight)
        kept = torch.empty(vocab_size + 1, dtype=torch.bool, device=target.device)
        torch.gt(columns.largest, self._eps * size.amax(), out=kept[:-1])
        kept.index_fill_(0, target.where(target >= 0, vocab_size), True)  # the last one takes what is in no column
        kept = kept[:-1]
        mass = columns.total.masked_fill(kept, 0)
        group, right = groups_of(mass, kept)
        last = kept.cumsum(0, dtype=torch.int32)
        num_kept = last[-1]
        # Written so that a tail that is not finite is dense too, and shows in the gradients.
        few = (num_kept <= MOST_KEPT * vocab_size) & (mass.sum() <= self._most_dropped * size.sum())
        return torch.where(kept, last - 1, -1 - group.int()), num_kept, few.logical_not().int(), right

    def hidden_gradient(self, kept: CompactChunk) -> Tensor:
        """The gradient of a chunk's hidden states, (C, D), in fp32 where the device forms it so."""
        if kept.place is None:
            return wide_product(kept.columns, self._weight).to(self._wide).addmm_(kept.left, not_none(kept.tail))
        width = kept.columns.shape[1]
        rows = self._kernels.head_rows(self._weight, kept.place, kept.tail, kept.num_kept, width, self._scale)
        # One product, since kept columns and tail may cancel out; the tail in two parts, so that it is not rounded.
        return wide_product(kept.columns, rows)

    def add_head_gradients(
        self,
        weight: Tensor | None,  # None: its gradient stays here until `head_gradient`
        bias: Tensor | None,  # (V,)
        x: Tensor,  # (C, D)
        kept: CompactChunk,
        scale: Tensor | None = None,
    ) -> None:
        """Keep a chunk's terms of the weight's gradient, and add those of the bias's."""
        if bias is not None:
            part = kept.columns[:, : kept.num_kept if kept.place is not None else None].sum(0, dtype=bias.dtype)
            if kept.place is not None:
                part = nn.functional.pad(part, (0, 1))[kept.place.where(kept.place >= 0, kept.num_kept)]
            bias.add_(part).addmv_(kept.right.to(bias.dtype), kept.left.sum(0, dtype=bias.dtype))
        if self._head_sum is None:
            return
        if kept.place is None:
            self.add_dense(kept.columns, x)
            self._rights.append(kept.right)
            self._lefts.append(kept.left.t() @ x.to(self._wide))
            return
        width, num_tails = kept.columns.shape[1], kept.left.shape[1]
        part = self._room_for(width)
        add_product_(part, kept.columns.t(), x, first=True)
        tails = part[kept.num_kept : kept.num_kept + 3 * num_tails]
        first, _, rest = torch.unflatten(tails, 0, (3, num_tails))
        self._rights.append(kept.right)
        self._lefts.append((first + rest) * self._scale)
        place = kept.place
        self._places.append(place.where(place < 0, place + self._used) if self._used else place)
        self._used += kept.num_kept  # what is behind may be overwritten

    def add_dense(self, gradients: Tensor, x: Tensor) -> None:
        """Add a chunk's product of all columns, from the gradients (C, V) of its logits, to the weight's gradient."""
        if self._head_sum is None:
            return
        first = self.total is None
        if self.total is None:
            self.total = scratch(*self._weight.shape, dtype=self._head_sum, device=x.device)
        add_product_(self.total, gradients.t(), x, first=first)

    @property
    def sums(self) -> list[Tensor]:
        """The terms of the weight's gradient that are proportional to the scale of the logits' gradients."""
        return [*([] if self.total is None else [self.total]), self._parts[: self._used], *self._lefts]

    def finish(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """The bias has its tails already, and the weight's gradient is `head_gradient`."""

    def head_gradient(self, into: Tensor | None) -> Tensor | HeadTerms | None:
        """The gradient of the weight, or its terms, for all chunks; None if it was added ``into`` (V, D)."""
        if self._head_sum is None:
            return None
        terms = self._terms()
        if into is None:
            return terms
        if isinstance(terms, HeadTerms) and (terms.total is into or (terms.total is None and into.is_contiguous())):
            self._kernels.finished(into, into, *terms[2:])
        elif terms is not into:
            into += terms.to(self._wide)
        return None

    def _terms(self) -> Tensor | HeadTerms:
        if not self._rights:
            return torch.zeros_like(self._weight, dtype=self._head_sum) if self.total is None else self.total
        places = torch.stack(self._places) if self._places else self._rights[0].new_empty(0, 0, dtype=torch.int32)
        right, left = torch.cat(self._rights, 1), torch.cat(self._lefts)
        return HeadTerms(self._kernels, self.total, self._parts[: self._used], places, right, left)

    def _room_for(self, rows: int) -> Tensor:
        """Room for the ``rows`` of a chunk's product behind those of the others."""
        most = max(rows, int(_MOST_PARTS * len(self._weight)))
        if self._used + rows > most:  # a sum of them all takes no more memory by now
            total = self._terms()
            if self.total is None or self.total.dtype != self._wide:
                self.total = total.to(self._wide)
            elif isinstance(total, HeadTerms):
                self._kernels.finished(self.total, *total[1:])
            self._rights, self._lefts, self._places, self._used = [], [], [], 0
        if self._used + rows > len(self._parts):
            ahead = rows if self._num_chunks == 1 else math.ceil(_MORE * rows * self._num_chunks)
            before = self._parts[: self._used]
            self._parts = before.new_empty(min(most, max(ahead, self._used + rows)), before.shape[1])
            self._parts[: self._used] = before
        return self._parts[self._used : self._used + rows]


def filter_kernels(specification: Specification, device: torch.device) -> ModuleType | None:
    """The passes of this filter where the row kernels are Triton's; None where torch's run."""
    if specification.row_kernels(device) is torch_rows:
        return None
    return importlib.import_module("chunked_ce.rows.triton_filter")
