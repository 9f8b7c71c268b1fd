"""Divergences between the distributions of a teacher and a student."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from chunked_ce.arguments import described, number
from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["Divergence"]


@dataclasses.dataclass(frozen=True)
class Divergence(Objective):
    """The divergence of a student's distribution q from the distribution p of its `Teacher`, both at the temperature.

    With ``m = beta p + (1 - beta) q``, it is KL(p || q) for ``beta=0``, KL(q || p) for ``beta=1``, and between them the
    generalised Jensen-Shannon divergence ``beta KL(p || m) + (1 - beta) KL(q || m)`` (arXiv:2306.13649, section 2), as
    defined, without a factor of the temperature squared. Gradients go to the student only. ``target`` only says which
    tokens count.

    Raises ``TypeError`` or ``ValueError`` when it is made with a value that is not allowed.

    >>> Divergence(beta=1.0).statistics
    ('reverse_kl',)
    """

    beta: float = 0.0
    """In [0, 1]."""

    def __post_init__(self) -> None:
        if not 0.0 <= number("beta", self.beta) <= 1.0:
            raise ValueError(f"beta must be in [0, 1], was {described(self.beta)}")
        object.__setattr__(self, "beta", float(self.beta))

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on a field
        if 0 < self.beta < 1:
            return "mixture_kl", "student_kl"
        return ("reverse_kl",) if self.beta else ("forward_kl",)

    @property
    def teacher_share(self) -> float:  # type: ignore[override]  # it depends on a field
        return self.beta

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        divergence: Tensor = getattr(rows, self.statistics[0])
        return divergence

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        none, name = torch.zeros_like(rows.log_sum), self.statistics[0]
        return RowStatistics(None, none, none)._replace(**{name: torch.ones_like(none)})
