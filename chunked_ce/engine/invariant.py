"""Batch-invariant statistics: the bits of a token's statistics depend on its hidden state and the head alone.

A product or a reduction sums in an order that depends on its shape, on the alignment of its memory and on the number of
threads. So here each of them has one shape, for one token as for many: tokens are taken in groups of one size, the last
one filled up with zeros, and the vocabulary in blocks of one size. Rows and columns of the factors are filled up to
multiples of 16 numbers, since matrix libraries treat what is left beyond whole vectors differently in different rows.
Tests prove on the CPU that the place in a group then makes no difference either.

`chunked_ce.engine.sweep` computes the gradients, from logits of other shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce.engine import plan_log
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import columns_of
from chunked_ce.engine.products import project
from chunked_ce.engine.sources import Chunk, DepthsSource, HeadSource
from chunked_ce.narrowing import not_none
from chunked_ce.plan import Plan, filled
from chunked_ce.rows.statistics import PerRow, RowStatistics, merge_shards, statistics_of, work_dtype, zero_statistics

__all__ = ["statistics"]

_ALIGNED = 64  # bytes


def statistics(call: Call) -> RowStatistics:
    """The statistics of every row, (N,) each and 0 for tokens that do not count."""
    specification, settings = call.specification, call.specification.settings
    source = (DepthsSource if call.num_depths > 1 else HeadSource)(call)
    plan = Plan.fixed(len(source.weight), settings)
    source.cut(plan)
    if plan_log.LOGS_PLANS:
        plan_log.log_values(call, source)
    tiles, names = _Tiles(source, plan), specification.names
    parts: dict[int, Tensor] = {}  # (M, columns) of each group, by its first token
    entries = not_none(plan.entries)
    for start in range(0, len(source.weight), entries):
        block = _Block(source, tiles, slice(start, min(start + entries, len(source.weight))))
        for chunk in source.parts():
            part, before = block.part(chunk), parts.get(chunk.rows.start)
            if before is not None:
                part = merge_shards(torch.stack([before, part]).double(), names)
            parts[chunk.rows.start] = part
    dtype = settings.compute_dtype
    whole = zero_statistics(len(call.target), names, dtype, call.target.device, call.num_ids)
    for rows in source.tokens.blocks(plan.tokens):
        part = parts.pop(rows.start).to(work_dtype(dtype))
        found = statistics_of(part, tiles.group(source.tokens.target[rows], 0), names)
        source.tokens.put_statistics(whole, rows, found.at(slice(rows.stop - rows.start)))
    return whole


class _Tiles:
    """Memory of fixed shape and alignment for the factors and the logits of one group of tokens and one block."""

    def __init__(self, source: HeadSource, plan: Plan) -> None:
        self._tokens = plan.tokens
        self._entries = filled(min(not_none(plan.entries), len(source.weight)))
        self._scratch: dict[str, Tensor] = {}
        self.dtype = source.logits_dtype  # of the factors too: this device forms no wide product of narrow ones

    def hidden(self, name: str, x: Tensor) -> Tensor:
        """Hidden states (c, D) as a tensor (M, D'), followed by zeros."""
        tile = self._zeros(name, self._tokens, filled(x.shape[1]))
        tile[: len(x), : x.shape[1]] = x
        tile[len(x) :] = 0
        return tile

    def rows(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the head (b, D), rounded to ``dtype``, as a tensor (b', D') followed by zeros: themselves, if they
        have that shape, dtype and alignment."""
        shape = filled(len(weight)), filled(weight.shape[1])
        fits = weight.shape == shape and weight.is_contiguous() and weight.data_ptr() % _ALIGNED == 0
        if fits and weight.dtype == self.dtype:
            return weight
        tile = self._zeros(name, *shape)[: shape[0]]  # the first block is the largest
        tile[: len(weight), : weight.shape[1]] = weight.to(dtype)
        tile[len(weight) :] = 0
        return tile

    def entries(self, values: Tensor) -> Tensor:
        """A number for each of b entries as a tensor (b',), followed by zeros."""
        tile = values.new_zeros(filled(len(values)))
        tile[: len(values)] = values
        return tile

    def group(self, values: Tensor, fill: float) -> Tensor:
        """Values (c, ...) of the tokens of a group as a tensor (M, ...)."""
        tile = values.new_full((self._tokens, *values.shape[1:]), fill)
        tile[: len(values)] = values
        return tile

    def logits(self, entries: int) -> Tensor:
        """Room for the logits (M, b')."""
        if "logits" not in self._scratch:
            self._scratch["logits"] = torch.empty(self._tokens * self._entries, dtype=self.dtype)
        return self._scratch["logits"][: self._tokens * entries].view(self._tokens, entries)

    def _zeros(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self._scratch:
            self._scratch[name] = torch.zeros(rows, columns, dtype=self.dtype)
        return self._scratch[name]


class _Block:
    """A block of the vocabulary."""

    def __init__(self, source: HeadSource, tiles: _Tiles, entries: slice) -> None:
        self._source, self._tiles, self._first, self._size = source, tiles, entries.start, entries.stop - entries.start
        self._row_kernels = source.call.specification.row_kernels(source.hidden.device)
        self._weight = tiles.rows("weight", source.weight[entries], source.dtype)
        self._bias = None if source.bias is None else tiles.entries(source.bias[entries].to(tiles.dtype))
        adapter, classes = source.adapter_weight, source.class_weight
        self._adapter = None if adapter is None else tiles.rows("adapter_weight", adapter[entries], source.dtype)
        self._class_weight = None if classes is None else tiles.entries(classes[entries])[: self._size]

    def part(self, chunk: Chunk) -> Tensor:
        """The part (M, columns) of a group's statistics in this block, with rows after its tokens that mean nothing."""
        source, tiles, specification = self._source, self._tiles, self._source.call.specification
        low_rank = None
        if self._adapter is not None:
            low_rank = tiles.hidden("adapter_hidden", not_none(chunk.adapter_x)), self._adapter
        out = tiles.logits(len(self._weight))
        hidden = tiles.hidden("hidden", not_none(chunk.x))
        products = project(hidden, self._weight, self._bias, out, low_rank)[:, : self._size]
        temperature, ids = source.temperature, source.ids
        if temperature is not None:
            temperature = tiles.group(temperature[chunk.rows], 1)
        if ids is not None:
            ids = tiles.group(columns_of(ids[chunk.rows], self._first, self._size), -1)
        column = columns_of(tiles.group(source.tokens.target[chunk.rows], 0), self._first, self._size)
        arguments = products, column, self._class_weight, specification.logits, specification.names, self._first
        per_row = PerRow(temperature, ids)
        part: Tensor = self._row_kernels.shard_statistics(*arguments, overwrite=True, per_row=per_row)
        return part
