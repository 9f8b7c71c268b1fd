"""Totals over chunks, where gradients are computed in the forward: the loss, and the statistics of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce.devices import rounds_products, unrounded
from chunked_ce.engine.call import Call
from chunked_ce.engine.gradient_products import TargetGradients, power_of_two
from chunked_ce.engine.sources import Source
from chunked_ce.narrowing import not_none
from chunked_ce.objectives.base import Tokens
from chunked_ce.rows.statistics import STATISTICS, RowStatistics, weight_sum, work_dtype, zero_statistics

__all__ = ["ForwardTotals", "keeps_targets"]

_MOST_GROWTH = 2.0**64  # of a chunk's scale over the least one before, whose fp32 sums it multiplies


def keeps_targets(call: Call, head_sum_dtype: torch.dtype) -> bool:
    """Whether the targets' terms are added to the head's gradient in the backward: the narrow gradient of a single
    chunk would round them twice.

    A sequence shard does not: the other ranks' hidden states are gone by then.
    """
    settings = call.specification.settings
    narrow = head_sum_dtype not in (unrounded(head_sum_dtype), settings.accumulate_dtype)
    rounds = rounds_products(call.target.device.type, settings.compute_dtype)
    return call.specification.needs("weight") and narrow and rounds and not call.is_sequence


class ForwardTotals:
    """The loss of one call and the statistics of its rows, added up chunk by chunk."""

    def __init__(self, source: Source, head_sum_dtype: torch.dtype) -> None:
        call, tokens = source.call, source.tokens
        specification = call.specification
        self._dtype = work_dtype(specification.settings.compute_dtype)
        self._objective, self._tokens, self._source = not_none(specification.objective), tokens, source
        self._temperature, self._scale = source.temperature, specification.logits.scale
        self._losses = torch.zeros_like(tokens.target, dtype=torch.float64)  # (n,)
        selected = {name: tokens.select(source.in_chunk_order(values)) for name, values in call.per_token.items()}
        self._coefficient = tokens.mask(selected.pop("_coefficient"))  # (n,)
        tensors = self._objective.tensors(selected, call.ignore_index)
        classes = call.class_weight
        target_weight = None if classes is None else classes[tokens.target]
        self._largest_weight = 1.0 if classes is None else classes.abs().amax()
        self._known = Tokens(call.vocab_size, weight_sum(classes, call.vocab_size), target_weight, tensors)
        self._least_scale = self._coefficient.new_full((), torch.inf)
        size, device = len(call.target), call.target.device
        dtype = specification.settings.compute_dtype
        self.statistics = zero_statistics(size, specification.names, dtype, device, call.num_ids)
        self.targets: Tensor | None = None  # (N,) gradients of the targets' logits
        if keeps_targets(call, head_sum_dtype):
            self.targets = torch.zeros(size, dtype=torch.float32, device=device)

    @property
    def loss(self) -> Tensor:
        """The sum of this rank's losses, ()."""
        return self._source.own(self._losses).sum().to(self._dtype)

    def slopes(self, rows: slice, block: RowStatistics, part: slice = slice(None)) -> RowStatistics:
        """The slopes of the rows ``part`` of the tokens ``rows``, whose statistics are ``block``."""
        return self._slopes(rows, block, part).map(lambda slope: slope.to(self._dtype))

    def scaled_slopes(self, rows: slice, block: RowStatistics, *, largest: float) -> tuple[RowStatistics, Tensor]:
        """The slopes of the tokens ``rows`` times a power of two (), and that power: it brings the largest gradient of
        their logits close to ``largest``, but not above."""
        slopes = self._slopes(rows, block)
        scale = power_of_two(largest / self._bound(slopes, block).amax())
        scale = torch.minimum(scale, self._least_scale * _MOST_GROWTH)
        self._least_scale = torch.minimum(scale, self._least_scale)
        return slopes.map(lambda slope: (slope * scale).to(self._dtype)), scale

    def add(self, rows: slice, block: RowStatistics) -> None:
        """Store the losses and the statistics of the tokens ``rows``."""
        losses = self._objective.token_loss(block, self._known.at(rows)) * self._coefficient[rows]
        self._losses[rows] = self._tokens.mask(losses, rows)
        self._tokens.put_statistics(self.statistics, rows, block)

    def keep_targets(self, rows: slice, targets: TargetGradients | None) -> bool:
        """Store the gradients of the targets' logits for the backward, if it needs them; whether it does."""
        if targets is None or self.targets is None:
            return False
        self._tokens.put(self.targets, rows, targets.gradient)
        return True

    def _slopes(self, rows: slice, block: RowStatistics, part: slice = slice(None)) -> RowStatistics:
        """The slopes in the coefficients' dtype, whose range includes a weight and its reciprocal."""
        if part != slice(None):
            rows = slice(rows.start + part.start, rows.start + part.stop)
        slopes = self._objective.slopes(block, self._known.at(rows))
        factor = self._coefficient[rows] * self._scale
        if self._temperature is not None:
            factor = factor / self._temperature[rows]
        return slopes.scaled(factor).map(lambda slope: self._tokens.mask(slope, rows))

    def _bound(self, slopes: RowStatistics, block: RowStatistics) -> Tensor:
        """A bound (n,) on the gradients of a row's logits: those besides the target's share 1 - p of the slope."""
        rest = -torch.expm1(block.logprob)  # 1 - p of the target
        rest = rest.clamp(min=torch.finfo(rest.dtype).eps)  # at least what 1 - p may have rounded to 0
        bound = slopes.log_sum.abs() * rest + (slopes.log_sum + slopes.target).abs()
        for name, slope in slopes.named().items():
            bound = bound + STATISTICS[name].bound(slope, block, self._largest_weight)
        return bound
