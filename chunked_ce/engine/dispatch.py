"""From checked arguments to operators: the weights of tokens, the loss, and its statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chunked_ce.engine import gathered, gathered_operator, loss_operator, plain, statistics_operator
from chunked_ce.engine.call import Call
from chunked_ce.engine.device_memory import short_budget
from chunked_ce.engine.loss_stats import LossStats, loss_stats, named_stats, plain_loss_stats
from chunked_ce.narrowing import not_none
from chunked_ce.objectives.base import Objective
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.plan import Settings
from chunked_ce.rows.statistics import RowStatistics, work_dtype
from chunked_ce.tracing import has_values, is_recorded, runs_at_once

__all__ = ["TokenWeights", "gathered_logits", "is_transformed", "loss", "settings_of", "statistics", "stats"]


class TokenWeights(NamedTuple):
    """The flattened targets and their weights, in the work dtype."""

    target: Tensor  # (N,)
    ignore_index: int
    classes: Tensor | None  # (V,)
    tokens: Tensor | None  # (N,)

    @classmethod
    def of(cls, call: Call, token_weight: Tensor | None) -> TokenWeights:
        dtype = work_dtype(call.specification.settings.compute_dtype)
        tokens = None if token_weight is None else token_weight.reshape(-1).to(dtype)
        return cls(call.target, call.ignore_index, call.class_weight, tokens)

    @property
    def counted(self) -> Tensor:
        return self.target != self.ignore_index

    def shares(self) -> Tensor:
        """The weight of every token, including ignored ones, (N,) float64."""
        if self.tokens is None:
            return torch.ones_like(self.target, dtype=torch.float64)
        return self.tokens.double()

    def total(self) -> Tensor:
        """The sum of ``token_weight * weight[target]`` over the tokens that count, () float64."""
        counted = self.counted
        share = self.shares().where(counted, 0)
        if self.classes is not None:
            # The chunks report an out-of-range target; here it must only not be used as an index.
            readable = counted & (self.target >= 0) & (self.target < self.classes.shape[0])
            share = share * self.classes[self.target.where(readable, 0)]
        return share.sum()

    def coefficient(self, reduction: str, num_tokens: float | Tensor | None) -> Tensor:
        """The factor of each token's loss in the value that ``reduction`` asks for, (N,) float64."""
        if reduction != "mean":
            return self.shares()
        denominator = self.total() if num_tokens is None else _on_device(num_tokens, torch.float64, self.target.device)
        return torch.where(denominator == 0, 0.0, self.shares() / denominator)


def loss(
    call: Call,
    coefficient: Tensor,  # (N,) float64
    *,
    in_forward: bool,  # whether gradients may be computed in the forward
    reduces: bool,  # False: the loss of each token
) -> tuple[Tensor, RowStatistics]:
    """The loss, () or (N,), and the statistics of every row."""
    objective = call.specification.objective
    if in_forward and reduces and any(call.specification.needed) and not is_transformed(call.specification.shard):
        return loss_operator.loss(call.with_per_token({"_coefficient": coefficient} | call.per_token))
    rows = statistics(call.for_statistics())
    losses = _losses(call, not_none(objective), rows, coefficient)
    dtype = work_dtype(call.specification.settings.compute_dtype)
    return (losses.sum() if reduces else losses).to(dtype), rows


def statistics(call: Call) -> RowStatistics:
    """The statistics of every row, differentiable, (N,) each and 0 where ignored."""
    of = plain.statistics if is_transformed(call.specification.shard) else statistics_operator.statistics
    return of(call)


def gathered_logits(call: Call) -> Tensor:
    """The logits, before scale and softcap, at the ids of all tensors per token, (N, M), differentiable."""
    if is_transformed(call.specification.shard):
        return gathered.plain_logits(call)
    return gathered_operator.logits(call)


def stats(call: Call, weights: TokenWeights, rows: RowStatistics) -> LossStats:
    rows, objective = rows.map(Tensor.detach), not_none(call.specification.objective)
    loss_sum = _losses(call, objective, rows, weights.shares()).sum()
    arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size, call.per_token
    sums = objective.counted_sums(rows, *arguments)
    plainly = runs_at_once(loss_sum) or is_transformed(call.specification.shard)
    stats_of = plain_loss_stats if plainly else loss_stats
    known = loss_sum, weights.total(), rows.lse, not_none(rows.correct), rows.entropy, weights.counted
    return named_stats(tuple(sums), stats_of(*known, list(sums.values())))


def _losses(call: Call, objective: Objective, rows: RowStatistics, coefficient: Tensor) -> Tensor:
    """The losses of all tokens times ``coefficient``, (N,); float64 has the range for a weight's inverse."""
    arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size
    return objective.losses(rows.map(Tensor.double), *arguments, {"_coefficient": coefficient} | call.per_token)


def is_transformed(sharded: object | None) -> bool:
    """Whether a ``torch.func`` transform or forward mode is active, which need plain torch operations; an error if
    the vocabulary is ``sharded``, not None."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and sharded is not None:
        raise NotImplementedError("vocab: no torch.func transforms and no forward mode with a sharded vocabulary")
    return transformed


def settings_of(
    options: ChunkOptions, input: Tensor, linear_weight: Tensor, compute_dtype: torch.dtype, vocab: VocabShard | None
) -> Settings:
    """The settings for a head, given its device and the current graph."""
    settings = Settings.of(options, compute_dtype, input.device.type)
    sizes = *input.shape, *linear_weight.shape
    # Ranks that share a plan may differ in free memory.
    if settings.memory_budget is None and settings.chunk_size is None and vocab is None and has_values(*sizes):
        budget = short_budget(options, input, linear_weight, compute_dtype)
        settings = settings._replace(memory_budget=budget)
    if is_recorded() or not has_values(*sizes):  # one graph for any number of tokens
        settings = settings._replace(head_sum_dtype=settings.wide_dtype)
    return settings


def _on_device(number: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor () without waiting for the device."""
    if isinstance(number, Tensor):
        return number.detach().to(device, dtype, non_blocking=True).reshape(())
    # A product, unlike `torch.full`, accepts a number that a compiler keeps as an input of its graph.
    return torch.ones((), dtype=dtype, device=device) * float(number)
