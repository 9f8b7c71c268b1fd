"""The products of a chunk whose row pass leaves exponentials where gradients would be: `chunked_ce.rows.exponentials`.

One pass over the logits instead of two: it reads b bytes of each and writes 2, where statistics and gradients read 2 b
and write 2.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.engine.call import Call
from chunked_ce.engine.gradient_products import ChunkProducts
from chunked_ce.engine.head_gradients import HiddenGradient
from chunked_ce.engine.products import add_product_, wide_product
from chunked_ce.engine.ranks import OneRank
from chunked_ce.engine.sources import Block, Chunk, HeadSource
from chunked_ce.narrowing import not_none
from chunked_ce.rows import torch_rows
from chunked_ce.rows.exponentials import STATISTICS, ScaledExponentials, statistics_and_sums
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["FUSED_ON", "ExponentialProducts", "exponential_kernels", "fusing"]

FUSED_ON: frozenset[str] = frozenset()
"""The devices, by `torch.cuda.get_device_name`, on which the product that takes the exponentials itself
(`chunked_ce.rows.triton_product`) was measured to be faster than a product of logits and a row pass. Empty: nothing
has been measured."""
_fuses: bool | None = None  # None: as the table says


@contextlib.contextmanager
def fusing(value: bool) -> Iterator[None]:
    """Use that product, or do not, wherever it can run: for tests and measurements."""
    global _fuses
    before, _fuses = _fuses, value
    try:
        yield
    finally:
        _fuses = before


def exponential_kernels(source: HeadSource) -> ModuleType | None:
    """The row kernels of the one-pass way, if it serves the forward gradients of this source; else None.

    It serves bf16 products of a whole vocabulary with slopes in ``log_sum`` and ``target`` only, and no softcap, on a
    device whose products come in fp32.
    """
    call = source.call
    specification = call.specification
    settings, logits = specification.settings, specification.logits
    served = (
        specification.names == STATISTICS
        and specification.shard is None
        and settings.gradient_filter is None
        and settings.compute_dtype == torch.bfloat16
        and settings.wide_dtype == torch.float32
        and logits.softcap is None
        and logits.scale > 0
        and call.vocab_size > 0
    )
    return _kernels(call) if served and _saves_traffic(source) else None


def _saves_traffic(source: HeadSource) -> bool:
    """Whether the pass saves more than the sum of the head's gradient costs: a narrow one, of a single chunk, has to
    hold the targets' terms before the product adds to it. That is 4 bytes for each of its V * D elements, against 2
    for each of N * V logits."""
    narrow = source.call.specification.needs("weight") and source.plan.head_sum == torch.bfloat16
    return not narrow or len(source.tokens) > 2 * source.hidden.shape[1]


def _kernels(call: Call) -> ModuleType | None:
    """Triton's kernels, where they run and products come in fp32; tests put the torch twins here."""
    device, dtype = call.target.device, call.specification.settings.compute_dtype
    if call.specification.row_kernels(device) is torch_rows or not devices.adds_in_product(
        device.type, torch.float32, dtype
    ):
        return None
    return importlib.import_module("chunked_ce.rows.triton_exponentials")


def _product_kernels(source: HeadSource) -> ModuleType | None:
    """The product that takes the exponentials itself, where it is chosen and can run; tests put its twin here."""
    call = source.call
    device = call.target.device
    chosen = _fuses
    if chosen is None:
        chosen = device.type == "cuda" and bool(FUSED_ON) and torch.cuda.get_device_name(device) in FUSED_ON
    if not chosen or "adapter_weight" in call.specification.parts:
        return None
    module = importlib.import_module("chunked_ce.rows.triton_product")
    return module if module.takes(source.head.weight) else None


class ExponentialProducts(ChunkProducts):
    """The gradients of a head in the forward, from exponentials and factors."""

    def __init__(self, source: HeadSource, ranks: OneRank, kernels: ModuleType) -> None:
        super().__init__(source, ranks, None, keeps_unrounded=True)
        self._kernels = kernels
        self._product = _product_kernels(source)
        source.forms_products = self._product is None
        self._scaled: ScaledExponentials | None = None  # of the current chunk

    def exponentiate_(
        self, chunk: Chunk, block: Block, slopes_of: Callable[[RowStatistics], RowStatistics]
    ) -> RowStatistics:
        """The statistics (C,) each of a chunk, whose exponentials the next `add` enters with the slopes of these."""
        values = block.gradients
        part: Tensor
        arguments = block.column, self._source.call.specification.logits, values
        if self._product is None:
            part = self._kernels.exponentials(block.products, *arguments, per_row=block.per_row)
        else:
            factors = chunk.x, block.weight, self._source.head.bias
            part = self._product.product_exponentials(*factors, *arguments, per_row=block.per_row)
        rows, sums = statistics_and_sums(part, block.column)
        self._scaled = ScaledExponentials.of(values, sums, block.column, rows, slopes_of(rows))
        return rows

    def targets_of(self, block: Block) -> None:
        return None

    def _hidden_of(
        self, total: HiddenGradient | None, weight: Tensor, block: Block, kept: Any, targets: Any
    ) -> Tensor | None:
        if total is None:
            return None
        scaled = not_none(self._scaled)
        part = wide_product(scaled.values, weight).mul_(scaled.factor.unsqueeze(1))
        return part.addcmul_(scaled.residual.unsqueeze(1), weight.index_select(0, scaled.column))

    def add_head(self, chunk: Chunk, block: Block, kept: Any, targets: Any, *, weight_later: bool) -> None:
        for pair, x in zip(self.total.pairs, chunk.xs, strict=True):
            if pair.weight is not None:
                is_main = pair is self.total.pairs[0]
                self._add_weight(pair.weight, x, first=is_main and self._first)
                self._first = self._first and not is_main
        if self.total.bias is not None:
            self._kernels.add_columns_(self.total.bias, self._scaled)

    def _add_weight(self, total: Tensor, x: Tensor, *, first: bool) -> None:
        """Add the share of hidden states ``x`` (C, D) to the gradient (V, D) of their factor; the product rounds a
        narrow one once, with all terms in it."""
        scaled = not_none(self._scaled)
        scaled_x = scaled.scaled(x)
        narrow = first and total.dtype == scaled_x.dtype
        if narrow:
            self._kernels.add_targets_(total.zero_(), scaled, x, scaled_x)
        add_product_(total, scaled.values.t(), scaled_x, first=first and not narrow)
        if not narrow:
            self._kernels.add_targets_(total, scaled, x, scaled_x)
