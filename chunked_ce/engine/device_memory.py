"""Smaller chunks where the memory of a device is short, and a second attempt with smaller ones when it runs out."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import MemoryPrediction, Plan, budget_within, predict_memory

__all__ = ["short_budget", "with_smaller_chunks"]

_Result = TypeVar("_Result")
_OURS = ("chunked_ce", "torch")


def short_budget(options: ChunkOptions, input: Tensor, linear_weight: Tensor, compute_dtype: torch.dtype) -> int | None:
    """The memory budget where a loss with the usual one would not fit into what is free; else None."""
    device = input.device
    if not _is_known(device):
        return None
    trained = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (input, linear_weight)]
    tokens, shape = math.prod(input.shape[:-1]), tuple(linear_weight.shape)
    dtypes = input.dtype, linear_weight.dtype, compute_dtype
    predicted = functools.partial(_predicted, options, tokens, shape, dtypes, *trained, device.type)
    free = _free_bytes(device, enough=predicted(None).peak)
    return budget_within(free, predicted)


@functools.lru_cache(maxsize=256)
def _predicted(
    options: ChunkOptions,
    num_tokens: int,
    shape: tuple[int, int],  # (V, D)
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],  # of the input, the head and the products
    train_input: bool,
    train_head: bool,
    device_type: str,
    memory_budget: int | None,
) -> MemoryPrediction:
    dtype, head_dtype, compute_dtype = dtypes
    return predict_memory(
        num_tokens,
        *shape,
        dtype=dtype,
        head_dtype=head_dtype,
        compute_dtype=compute_dtype,
        train_input=train_input,
        train_head=train_head,
        options=dataclasses.replace(options, memory_budget=memory_budget),
        device_type=device_type,
    )


def _is_known(device: torch.device) -> bool:
    """Whether the free memory of ``device`` is known: that of CUDA is, unless a graph is captured or compiled."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _free_bytes(device: torch.device, enough: int) -> int:
    """Free bytes; the driver, which may make the host wait, is asked only if torch keeps less than ``enough``."""
    try:
        kept = torch.cuda.memory_stats(device)
    except RuntimeError:  # an allocator that is not torch's own
        kept = {}
    kept_by_torch: int = kept.get("reserved_bytes.all.current", 0) - kept.get("allocated_bytes.all.current", 0)
    return kept_by_torch if kept_by_torch >= enough else kept_by_torch + torch.cuda.mem_get_info(device)[0]


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
