"""Tensors that stand for a head's logits. Importing the package registers the functions that they follow."""

from chunked_ce.lazy import consume, shapes

__all__ = ["consume", "shapes"]
