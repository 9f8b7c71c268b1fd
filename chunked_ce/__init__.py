"""Exact large-vocabulary cross-entropy in chunks: the logits never exist as a whole."""

import sys
from typing import TYPE_CHECKING

from chunked_ce._version import __version__

# The console script imports the package without its library, and loads that when a command needs it.
if TYPE_CHECKING or not getattr(sys.modules.get("chunked_ce_command"), "is_light", False):
    from chunked_ce import preference
    from chunked_ce.functional import (
        LossStats,
        cross_entropy,
        linear_cross_entropy,
        linear_divergence,
        linear_logprobs,
        linear_loss,
        linear_statistics,
        logits_loss,
    )
    from chunked_ce.lazy.logits import LazyLogits
    from chunked_ce.lm_head import LMHead
    from chunked_ce.modules import LinearCrossEntropyLoss
    from chunked_ce.objectives import Teacher
    from chunked_ce.options import ChunkOptions
    from chunked_ce.parallel.tokens import TokenMean, count_tokens, sequence_weights
    from chunked_ce.parallel.vocab import VocabShard
    from chunked_ce.token_statistics import TokenStatistics

__all__ = [
    "ChunkOptions",
    "LMHead",
    "LazyLogits",
    "LinearCrossEntropyLoss",
    "LossStats",
    "Teacher",
    "TokenMean",
    "TokenStatistics",
    "VocabShard",
    "__version__",
    "count_tokens",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_loss",
    "linear_statistics",
    "logits_loss",
    "preference",
    "sequence_weights",
]
