"""Exact large-vocabulary cross-entropy in chunks: the logits never exist as a whole."""

from chunked_ce.functional import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
