"""Which calls of a head in evaluation mode may wait with their logits: those of which only a loss is wanted."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.obstacles import obstacle_of_call
from chunked_ce.lazy.product import rows_per_block
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.dtensors import is_dtensor

__all__ = ["LABELS", "TRAINER", "purpose_of_call"]

TRAINER = "an evaluation by a Trainer that keeps the loss only"
LABELS = "a forward with labels in evaluation mode"


def purpose_of_call(head: LazyHead, hidden: Any) -> str | None:
    """What a call in evaluation mode is for, if its logits can wait for a loss; None if they are computed at once.

    They can where no gradient is taken, they are more than a chunk, and a loss is all that is wanted of them:
    ``prediction_step`` of a ``Trainer`` says so, and else that the model is given ``labels`` promises it. A reader of
    the logits breaks that promise, and the head then computes them at once in later calls.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    purpose = _purpose()
    if purpose is None or purpose in head.record.reads_logits:
        return None
    if obstacle_of_call(head, hidden) is not None:
        return None
    if _is_on_this_rank(head):
        return None if _is_one_chunk(head, hidden) else purpose
    # On all ranks alike, whatever the size of their batches, and only if no rank reads logits alone.
    return purpose if purpose is TRAINER else None


def _is_one_chunk(head: LazyHead, hidden: Tensor) -> bool:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    num_rows, options = hidden.shape[:-1].numel(), head.options or ChunkOptions()
    return rows_per_block(num_rows, head.vocab_size, hidden.shape[-1], dtype, options, device) >= num_rows


def _is_on_this_rank(head: LazyHead) -> bool:
    """Whether the logits can be computed without other ranks, and outside of the model's forward."""
    weight, _ = head.own_parameters()
    return head.layout is None and not hasattr(weight, "ds_id") and not is_dtensor(weight)


def _purpose() -> str | None:
    """What the callers of a head want, by their arguments."""
    frame, has_labels = sys._getframe(2), None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "prediction_step" and _takes(code, "prediction_loss_only"):
            return TRAINER if frame.f_locals["prediction_loss_only"] else None
        if frame.f_globals.get("__name__", "").startswith("transformers.generation."):
            return None
        if has_labels is None and code.co_name == "forward" and _takes(code, "labels"):
            has_labels = frame.f_locals["labels"] is not None  # not those of a student around this model, say
        frame = frame.f_back
    return LABELS if has_labels else None


def _takes(code: CodeType, name: str) -> bool:
    return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
