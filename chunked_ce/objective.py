"""The maths of a row: what one token's logits contribute to the loss, and its derivative.

Everything a row adds to the loss is a function of a few numbers of that row, its statistics. They are taken
relative to the row's largest logit ``m``, so that a large common offset of the logits costs no precision:

    log_sum   = log sum_v exp(z_v - m)          lse = m + log_sum
    target    = z_y - m                         nll = log_sum - target
    weighted  = sum_v w_v (z_v - m)             sum_v w_v (lse - z_v) = sum_v w_v * log_sum - weighted
    mean      = sum_v p_v (z_v - m)             entropy = log_sum - mean

With the slopes (s_lse, s_target, s_weighted, s_mean) of the loss in these four, the gradient of a logit is

    dz_v = p_v * (s_lse + s_mean * (1 + z_v - m - mean)) + s_target * [v == y] + s_weighted * w_v

This file holds the plain, differentiable torch code; `chunked_ce.engine.rows` is its fast twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Logits",
    "Objective",
    "RowStatistics",
    "combine_shards",
    "merge_shards",
    "row_statistics",
    "statistics_of",
]


class Logits(NamedTuple):
    """How logits follow from the product of hidden states and head."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """``scale * product``, then ``softcap * tanh(. / softcap)``; any shape."""
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class RowStatistics(NamedTuple):
    """Statistics of the rows, each (N,) and relative to ``maximum``; None where nobody asked for one."""

    maximum: Tensor
    log_sum: Tensor
    target: Tensor
    weighted: Tensor | None = None
    mean: Tensor | None = None
    correct: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """``function`` of every statistic there is."""
        return RowStatistics(*(None if part is None else function(part) for part in self))

    def at(self, rows: slice) -> RowStatistics:
        return self.map(lambda part: part[rows])

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_sum

    @property
    def nll(self) -> Tensor:
        return self.log_sum - self.target

    @property
    def entropy(self) -> Tensor:
        return self.log_sum - self.mean


class Objective(NamedTuple):
    """The loss of a token as a function of its row's statistics."""

    label_smoothing: float
    z_loss: float
    vocab_size: int

    def loss(
        self,
        rows: RowStatistics,
        target_weight: Tensor | None,  # (N,) class weight of each target
        weight_sum: Tensor | float,  # sum of the class weights
    ) -> Tensor:
        """The loss of each token before token weights, (N,)."""
        loss = rows.nll if target_weight is None else target_weight * rows.nll
        if self.label_smoothing:
            share = self.label_smoothing / self.vocab_size
            loss = (1 - self.label_smoothing) * loss + share * (weight_sum * rows.log_sum - rows.weighted)
        if self.z_loss:
            loss = loss + self.z_loss * rows.lse.square()
        return loss

    def slopes(
        self,
        rows: RowStatistics,
        target_weight: Tensor | None,
        weight_sum: Tensor | float,
    ) -> tuple[Tensor, Tensor, float]:
        """Derivatives of `loss` in ``log_sum`` (N,), ``target`` (N,) and ``weighted`` (one number for all rows)."""
        hit = torch.ones_like(rows.log_sum) if target_weight is None else target_weight
        hit = (1 - self.label_smoothing) * hit
        share = self.label_smoothing / self.vocab_size
        slope = hit + share * weight_sum if self.label_smoothing else hit
        if self.z_loss:
            slope = slope + 2 * self.z_loss * rows.lse
        return slope, -hit, -share

    def token_losses(
        self,
        rows: RowStatistics,  # 0 where ignored
        target: Tensor,  # (N,)
        ignore_index: int,
        class_weight: Tensor | None,  # (V,)
        coefficient: Tensor,  # (N,)
    ) -> Tensor:
        """The loss of each token times its coefficient, (N,), 0 where ignored."""
        counted = target != ignore_index
        target_weight = None if class_weight is None else class_weight[target.where(counted, 0)]
        weight_sum = float(self.vocab_size) if class_weight is None else class_weight.sum()
        return (self.loss(rows, target_weight, weight_sum) * coefficient).where(counted, 0)


def combine_shards(
    parts: Tensor,  # (R, N, columns)
    target: Tensor,  # (N,)
    *,
    weighted: bool = False,
    mean: bool = False,
    correct: bool = False,
) -> RowStatistics:
    """The statistics of rows whose columns lie in R shards, from each shard's own part (see `merge_shards`)."""
    wanted = {"weighted": weighted, "mean": mean, "correct": correct}
    return statistics_of(merge_shards(parts, **wanted), target, **wanted)


def merge_shards(
    parts: Tensor,  # (R, N, columns)
    *,
    weighted: bool = False,
    mean: bool = False,
    correct: bool = False,
) -> Tensor:
    """The part (N, columns) of a shard that holds the columns of all R shards.

    The columns of a part, relative to the shard's own maximum: that maximum, the sum of exponentials, the target's
    logit (-inf where the target is in another shard); if wanted ``weighted`` and the sum of the class weights; if
    wanted the sum of ``exp(z) * z``; if wanted the index of the largest logit. A shard without rows has a maximum of
    -inf and sums of 0.
    """
    columns = iter(parts.unbind(-1))  # (R, N) each
    maxima, sums, targets = next(columns), next(columns), next(columns)
    maximum = maxima.amax(0)
    # Clamped so that a shard without rows contributes 0, not NaN, also where no shard has a finite logit yet.
    lowest = torch.finfo(parts.dtype).min
    shift = (maxima - maximum.clamp(min=lowest)).clamp(min=lowest)
    share = shift.exp()
    merged = [maximum, (sums * share).sum(0), (targets + shift).amax(0)]
    if weighted:
        at_maxima, weight_sums = next(columns), next(columns)
        merged += [(at_maxima + weight_sums * shift).sum(0), weight_sums.sum(0)]
    if mean:
        merged.append((share * next(columns) + share * shift.clamp(min=-1000.0) * sums).sum(0))
    if correct:
        merged.append(next(columns).where(maxima == maximum, torch.inf).amin(0))
    return torch.stack(merged, -1)


def statistics_of(
    part: Tensor,  # (N, columns)
    target: Tensor,  # (N,)
    *,
    weighted: bool = False,
    mean: bool = False,
    correct: bool = False,
) -> RowStatistics:
    """The statistics of rows whose columns are all in the shard that ``part`` is of (see `merge_shards`)."""
    columns = iter(part.unbind(-1))  # (N,) each
    maximum, sum_exp, at_target = next(columns), next(columns), next(columns)
    sum_exp = sum_exp.where(maximum != -torch.inf, torch.nan)  # every word of the row is masked
    found = RowStatistics(maximum, sum_exp.log(), at_target)
    if weighted:
        found = found._replace(weighted=next(columns))
        next(columns)
    if mean:
        found = found._replace(mean=next(columns) / sum_exp)
    if correct:
        found = found._replace(correct=(next(columns) == target).to(part.dtype))
    return found


def row_statistics(
    logits: Tensor,  # (N, V), fp32 or fp64, scaled and capped
    target: Tensor,  # (N,) in [0, V)
    class_weight: Tensor | None = None,  # (V,)
    *,
    weighted: bool = False,
    mean: bool = False,
    correct: bool = False,
) -> RowStatistics:
    """The statistics of each row in plain differentiable torch: the reference of every kernel."""
    maximum = logits.detach().amax(-1, keepdim=True)
    shifted = logits - maximum
    log_sum = torch.logsumexp(shifted, -1)
    probabilities = shifted.softmax(-1)
    return RowStatistics(
        maximum.squeeze(-1),
        log_sum,
        shifted.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        (shifted if class_weight is None else shifted * class_weight).sum(-1) if weighted else None,
        (probabilities * shifted).sum(-1) if mean else None,
        (logits.argmax(-1) == target).to(logits.dtype) if correct else None,
    )
