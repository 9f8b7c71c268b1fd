"""Predicted peaks of the ways to compute the loss, by name of the contestant."""

from __future__ import annotations

import functools

import torch

from chunked_ce import ChunkOptions
from chunked_ce.cli.contestants import BACKWARD, FILTERED, FORWARD, FULL
from chunked_ce.plan import MemoryPrediction, predict_memory

__all__ = ["filter_covered", "full_logits", "predicted"]


def full_logits(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    train_input: bool = True,
    train_head: bool = True,
) -> MemoryPrediction:
    """What ``F.cross_entropy(F.linear(h, W).float(), y)`` takes.

    In the forward the fp32 logits and their log-softmax; in the backward the log-softmax and, of its size each, the
    gradients of the loss in it and in the logits. Then the gradient in the products' dtype, if that is another, and
    the gradients of hidden states and head, by when the fp32 gradients are freed but for the last one.

    >>> full_logits(4096, 131072, 256, dtype=torch.bfloat16).peak // 2**20
    6144
    """
    logits = num_tokens * vocab_size
    narrow = dtype.itemsize < 4
    wide = max(4, dtype.itemsize)
    forward = {"logits": logits * wide, "log_softmax": logits * wide}
    backward = {"log_softmax": logits * wide, "loss_grad": logits * wide, "logits_grad": logits * wide}
    last = {
        "logits_grad": logits * (dtype.itemsize if narrow else wide),
        "hidden_grad": train_input * num_tokens * hidden_size * dtype.itemsize,
        "head_grad": train_head * vocab_size * hidden_size * dtype.itemsize,
    }
    return MemoryPrediction(forward, max(backward, last, key=lambda terms: sum(terms.values())))


def predicted(
    contestant: str,
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    device: str,
    chunk: int | None = None,
    ignored: float = 0.0,
) -> MemoryPrediction | None:
    """The law of a contestant; None for those that have none."""
    if contestant == FULL:
        return full_logits(num_tokens, vocab_size, hidden_size, dtype=dtype)
    options: dict[str, object] = {"chunk_size": chunk or "auto"}
    if contestant == BACKWARD:
        options["gradients"] = "backward"
    elif contestant == FILTERED and filter_covered():
        options["gradient_filter"] = "auto"
    elif contestant != FORWARD:
        return None
    return predict_memory(
        num_tokens,
        vocab_size,
        hidden_size,
        dtype=dtype,
        num_counted=num_tokens - round(ignored * num_tokens) if device == "cpu" else None,
        options=ChunkOptions(**options),
        device_type=device,
    )


@functools.cache
def filter_covered() -> bool:
    """Whether there is a gradient filter and `chunked_ce.plan.predict_memory` has terms for it."""
    try:
        options = ChunkOptions(gradient_filter="auto"), ChunkOptions()
    except (TypeError, ValueError):
        return False
    filtered, exact = (predict_memory(8192, 131072, 1024, dtype=torch.bfloat16, options=own) for own in options)
    return any(ours.keys() - others.keys() for ours, others in zip(filtered, exact, strict=True))
