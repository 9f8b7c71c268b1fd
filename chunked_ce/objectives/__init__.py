"""Objectives: what `chunked_ce.linear_loss` minimises. `Objective` says how to write one."""

from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.objectives.cross_entropy import CrossEntropy
from chunked_ce.objectives.divergence import Divergence
from chunked_ce.objectives.policy_gradient import PolicyGradient
from chunked_ce.objectives.teacher import Teacher
from chunked_ce.objectives.top_k import TopKDivergence
from chunked_ce.rows.statistics import RowStatistics

__all__ = [
    "CrossEntropy",
    "Divergence",
    "Objective",
    "PolicyGradient",
    "RowStatistics",
    "Teacher",
    "Tokens",
    "TopKDivergence",
]
