"""Cross-entropy with label smoothing, class weights and a z-loss."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from chunked_ce.arguments import FLOATING, check_tensor, described, number
from chunked_ce.narrowing import not_none
from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["CrossEntropy", "check_class_weight", "check_label_smoothing", "check_z_loss"]


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """The cross-entropy of `chunked_ce.linear_cross_entropy`, whose docstring has its formula.

    Raises ``TypeError`` or ``ValueError`` when it is made with a value that is not allowed.

    >>> CrossEntropy(label_smoothing=0.1).statistics
    ('weighted',)
    """

    label_smoothing: float = 0.0
    """In [0, 1]."""

    z_loss: float = 0.0
    """Factor of ``lse**2``, >= 0."""

    class_weight: Tensor | None = dataclasses.field(default=None, compare=False)
    """Class weights (V,), constant."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_smoothing", check_label_smoothing(self.label_smoothing))
        object.__setattr__(self, "z_loss", check_z_loss(self.z_loss))
        check_class_weight(self.class_weight, "class_weight")

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on a field
        return ("weighted",) if self.label_smoothing else ()

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        loss = rows.nll if tokens.target_weight is None else tokens.target_weight * rows.nll
        if self.label_smoothing:
            share = self.label_smoothing / tokens.vocab_size
            smoothed = tokens.weight_sum * rows.log_sum - not_none(rows.weighted)
            loss = (1 - self.label_smoothing) * loss + share * smoothed
        if self.z_loss:
            loss = loss + self.z_loss * rows.lse.square()
        return loss

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        hit = torch.ones_like(rows.log_sum) if tokens.target_weight is None else tokens.target_weight
        weighted = None
        slope = hit
        if self.label_smoothing:
            hit = (1 - self.label_smoothing) * hit
            share = self.label_smoothing / tokens.vocab_size
            slope, weighted = hit + share * tokens.weight_sum, torch.full_like(hit, -share)
        if self.z_loss:
            slope = slope + 2 * self.z_loss * rows.lse
        return RowStatistics(None, slope, -hit, weighted)


def check_label_smoothing(value: float) -> float:
    if not 0.0 <= number("label_smoothing", value) <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], was {described(value)}")
    return float(value)


def check_z_loss(value: float, name: str = "z_loss") -> float:
    if not 0.0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, was {described(value)}")
    return float(value)


def check_class_weight(weight: Tensor | None, name: str = "weight") -> None:
    """Class weights, before a call says how many vocabulary entries there are."""
    if weight is None:
        return
    check_tensor(name, weight, FLOATING)
    if weight.dim() != 1:
        raise ValueError(f"{name} must have shape (V,), had {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss is not differentiated in it: detach it")
