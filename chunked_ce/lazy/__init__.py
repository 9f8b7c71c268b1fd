"""Tensors that stand for a head's logits. Importing the package registers the functions that they follow."""

from chunked_ce.lazy import arithmetic, consume, copies, distributions, mixtures, shapes, soft_targets, words

__all__ = ["arithmetic", "consume", "copies", "distributions", "mixtures", "shapes", "soft_targets", "words"]
