"""What is free on the device, and what to do when it runs out: once more, with smaller chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.engine.linear import Settings

__all__ = ["free_bytes", "with_smaller_chunks"]

_Found = TypeVar("_Found")


def free_bytes(device: torch.device) -> int | None:
    """What a CUDA device has left; None for other devices and while a graph is captured or compiled."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept_by_torch


def with_smaller_chunks(
    run: Callable[[Settings], _Found],
    settings: Settings,
    target: Tensor,  # (N,)
    weight: Tensor,  # (V, D)
    *,
    way: str,  # "forward", "statistics" or "backward"
) -> _Found:
    """``run(settings)``; if the device has no memory left, once more with a quarter of the logits at a time.

    Not where the user chose the size of the chunks.
    """
    try:
        return run(settings)
    except torch.OutOfMemoryError:
        if settings.chunk_size is not None:
            raise
    # Outside of the handler: the error keeps what the first attempt had allocated.
    n, vocab_size = len(target), len(weight)
    if way == "backward":
        words = plan.vocab_per_block(
            n, vocab_size, compute_dtype=settings.compute_dtype, memory_budget=settings.memory_budget
        )
        logits, unit, size, total = n * words, "words", words, vocab_size
    else:
        head_dtype = weight.dtype if way == "forward" else None
        tokens = plan.tokens_per_chunk(n, *weight.shape, head_dtype=head_dtype, **settings.planned)
        logits, unit, size, total = tokens * vocab_size, "tokens", tokens, n
    budget = max(1, logits * settings.compute_dtype.itemsize // 4)
    warnings.warn(
        f"out of memory with {size} of {total} {unit} at a time, {4 * budget / 2**20:.1f} MiB of logits; "
        f"trying once more with {budget / 2**20:.1f} MiB: ChunkOptions(memory_budget={budget}) starts there",
        stacklevel=2,
    )
    return run(settings._replace(memory_budget=budget))
