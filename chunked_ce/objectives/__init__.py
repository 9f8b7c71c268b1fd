"""Objectives: what `chunked_ce.linear_loss` minimises. `Objective` says how to write one."""

from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.objectives.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy", "Objective", "Tokens"]
