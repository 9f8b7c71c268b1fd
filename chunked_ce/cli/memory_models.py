"""Predicted peak memory of the implementations: the memory law for the chunked ones, another for full logits."""

from __future__ import annotations

import math
from typing import Any

from chunked_ce.light import torch
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import MemoryPrediction, predict_memory
from chunked_ce.sharded.costs import predict_sharded_memory

__all__ = ["compiled_logits", "full_logits", "predicted"]


def full_logits(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    train_input: bool = True,
    train_head: bool = True,
    with_teacher: bool = False,
) -> MemoryPrediction:
    """The memory that ``F.cross_entropy(F.linear(h, W).float(), y)`` takes.

    The forward holds the fp32 logits and their log-softmax. The backward holds the log-softmax, its gradient and that
    of the logits, all of one size; then the logits' gradient in the products' dtype, if that is another, and the
    gradients of hidden states and head, by when only one of the fp32 gradients is left. A teacher's log-softmax exists
    all the while, and ``F.kl_div`` forms its exponential, its difference to the student's and their product.

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
    teacher = {"teacher_logits": logits * wide} if with_teacher else {}
    if with_teacher:
        forward = {"log_softmax": logits * wide, "divergence": 3 * logits * wide}
    backward = max(backward, last, key=lambda terms: sum(terms.values()))
    return MemoryPrediction(forward | teacher, backward | teacher)


def compiled_logits(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    train_input: bool = True,
    train_head: bool = True,
) -> MemoryPrediction:
    """The memory that `full_logits` takes under ``torch.compile``.

    One kernel casts, normalizes and sums, and the gradient of the logits takes their place. With N=1024, D=128 and
    V=32768 on a CPU the peak in fp32 was that of logits and gradients within 1 %, in bf16 a quarter of the logits more.

    >>> compiled_logits(4096, 131072, 256, dtype=torch.bfloat16).peak // 2**20
    1090
    """
    logits = {"logits": num_tokens * vocab_size * dtype.itemsize}
    gradients = {
        "hidden_grad": train_input * num_tokens * hidden_size * dtype.itemsize,
        "head_grad": train_head * vocab_size * hidden_size * dtype.itemsize,
    }
    return MemoryPrediction(logits, logits | gradients)


def predicted(
    implementation: str,
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    device: str,
    chunk: int | None = None,
    ignored: float = 0.0,
    ranks: int | None = None,
) -> MemoryPrediction | None:
    """The memory that an implementation takes, on one of ``ranks`` if it has some; None for those without a model."""
    from chunked_ce.cli.implementations import CHUNKED, FULL
    from chunked_ce.cli.sharded_losses import OWN, SAME

    if implementation == OWN and ranks and not ignored:  # how many tokens count on a rank is left to chance
        return predict_sharded_memory(
            math.ceil(num_tokens / ranks),
            vocab_size,
            hidden_size,
            ranks=ranks,
            dtype=dtype,
            options=ChunkOptions(chunk_size=chunk or "auto"),
            device_type=device,
        )

    if implementation == FULL:
        return full_logits(num_tokens, vocab_size, hidden_size, dtype=dtype)
    if implementation not in (*CHUNKED, SAME):
        return None
    options: dict[str, Any] = {"chunk_size": chunk or "auto"} | CHUNKED.get(implementation, {})
    return predict_memory(
        num_tokens,
        vocab_size,
        hidden_size,
        dtype=dtype,
        num_counted=num_tokens - round(ignored * num_tokens),
        options=ChunkOptions(**options),
        device_type=device,
        ranks=ranks or 1,
    )
