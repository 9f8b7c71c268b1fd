"""The free memory of a device, and a second attempt with smaller chunks when it runs out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from chunked_ce.engine.call import Call
from chunked_ce.plan import Plan

__all__ = ["free_bytes", "with_smaller_chunks"]

_Result = TypeVar("_Result")
_OURS = ("chunked_ce", "torch")


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a CUDA device; None for other devices and while a graph is captured or compiled."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept_by_torch


def with_smaller_chunks(run: Callable[[Call], _Result], call: Call, plan_of: Callable[[], Plan]) -> _Result:
    """``run(call)``; if memory runs out, again with a quarter of the logits, unless the user chose the chunk size."""
    settings = call.specification.settings
    try:
        return run(call)
    except torch.OutOfMemoryError:
        if settings.chunk_size is not None:
            raise
    # Outside the handler: the error would keep the first attempt's tensors alive.
    plan, tokens = plan_of(), len(call.target)
    if plan.entries is None:
        logits, size, total, unit = plan.tokens * call.rows, plan.tokens, tokens, "tokens"
    else:
        logits, size, total, unit = tokens * plan.entries, plan.entries, call.rows, "vocabulary entries"
    taken = logits * settings.logit_bytes()
    if settings.memory_budget is not None and size < total:
        taken = settings.memory_budget  # the logits stay within it
    budget = max(1, taken // 4)
    warnings.warn(
        f"out of memory with {size} of {total} {unit} at a time, {4 * budget / 2**20:.1f} MiB of logits; "
        f"trying once more with {budget / 2**20:.1f} MiB: ChunkOptions(memory_budget={budget}) starts there",
        stacklevel=_caller_level(),
    )
    specification = call.specification._replace(settings=settings._replace(memory_budget=budget))
    return run(call._replace(specification=specification))


def _caller_level() -> int:
    """The ``stacklevel``, seen from the calling function, of the first frame outside torch and this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level
