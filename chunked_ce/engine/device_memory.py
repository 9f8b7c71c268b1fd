"""What is free on the device, and what to do when it runs out: once more, with smaller chunks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.engine.linear import Settings

__all__ = ["free_bytes", "with_smaller_chunks"]

_Found = TypeVar("_Found")
_OURS = ("chunked_ce", "torch")


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
    unit: Literal["tokens", "words"] = "tokens",  # what the logits are cut by
    sums_head: bool = False,  # whether the chunks add up to a gradient of the head
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
    if unit == "words":
        words = plan.vocab_per_block(
            n, vocab_size, compute_dtype=settings.compute_dtype, memory_budget=settings.memory_budget
        )
        logits, size, total = n * words, words, vocab_size
    else:
        head_dtype = weight.dtype if sums_head else None
        tokens = plan.tokens_per_chunk(n, *weight.shape, head_dtype=head_dtype, **settings.planned)
        logits, size, total = tokens * vocab_size, tokens, n
    taken = logits * settings.compute_dtype.itemsize
    if settings.memory_budget is not None and size < total:
        taken = settings.memory_budget  # which the logits keep to
    budget = max(1, taken // 4)
    warnings.warn(
        f"out of memory with {size} of {total} {unit} at a time, {4 * budget / 2**20:.1f} MiB of logits; "
        f"trying once more with {budget / 2**20:.1f} MiB: ChunkOptions(memory_budget={budget}) starts there",
        stacklevel=_caller_level(),
    )
    return run(settings._replace(memory_budget=budget))


def _caller_level() -> int:
    """The ``stacklevel``, for the function that asks, of the first frame outside of torch and this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level
