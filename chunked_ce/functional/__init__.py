"""The public functions: a docstring, a check, a call."""

from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.functional.objective_losses import linear_divergence, linear_loss, logits_loss
from chunked_ce.functional.per_token import linear_logprobs, linear_statistics
from chunked_ce.functional.target_losses import cross_entropy, linear_cross_entropy
from chunked_ce.keywords import PerToken

__all__ = [
    "LossStats",
    "PerToken",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_loss",
    "linear_statistics",
    "logits_loss",
]
