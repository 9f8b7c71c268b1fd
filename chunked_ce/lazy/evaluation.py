"""Which calls of a head in evaluation mode may wait with their logits: those of which only a loss is wanted."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.obstacles import is_fsdp_unit, obstacle_of_call
from chunked_ce.lazy.product import rows_per_block
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.dtensors import is_dtensor

__all__ = ["LABELS", "TRAINER", "purpose_of_call"]

TRAINER = "an evaluation by a Trainer that keeps the loss only"
LABELS = "a forward with labels in evaluation mode"
_NAMES = {"prediction_step", "generate", "forward", "_wrapped_call_impl"}
_FSDP = "torch.distributed.fsdp"


def purpose_of_call(head: LazyHead, hidden: Any) -> str | None:
    """What a call in evaluation mode is for, if its logits can wait for a loss; None if they are computed at once.

    They can where no gradient is taken, they are more than a chunk, and a loss is all that is wanted of them:
    ``prediction_step`` of a ``Trainer`` says so, and else that the model is given ``labels`` promises it. A reader of
    the logits breaks that promise, and the head then computes them at once in later calls.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    callers = _Callers.now()
    if callers.purpose is None or callers.purpose in head.record.reads_logits:
        return None
    if obstacle_of_call(head, hidden) is not None:
        return None
    weight, _ = head.own_parameters()
    if head.layout is None and not hasattr(weight, "ds_id") and not callers.have_fsdp and not is_dtensor(weight):
        return None if _is_one_chunk(head, hidden) else callers.purpose
    # On all ranks alike, whatever the size of their batches, and only if no rank reads logits alone. FSDP may take the
    # weight back after the forward, and with it what a loss outside needs.
    is_at_hand = callers.have_labels or not callers.have_fsdp or is_fsdp_unit(head)
    return TRAINER if callers.purpose is TRAINER and is_at_hand else None


def _is_one_chunk(head: LazyHead, hidden: Tensor) -> bool:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    num_rows, options = hidden.shape[:-1].numel(), head.options or ChunkOptions()
    return rows_per_block(num_rows, head.vocab_size, hidden.shape[-1], dtype, options, device) >= num_rows


class _Callers(NamedTuple):
    """Who calls a head, by the stack of frames."""

    purpose: str | None
    have_labels: bool  # that the innermost model which takes labels was given
    have_fsdp: bool

    @classmethod
    def now(cls) -> _Callers:
        frame: FrameType | None = sys._getframe(2)
        has_labels, has_fsdp, keeps_loss_only = None, False, None
        while frame is not None and keeps_loss_only is None:
            code = frame.f_code
            if code.co_name in _NAMES:
                if code.co_name == "prediction_step" and _takes(code, "prediction_loss_only"):
                    keeps_loss_only = bool(frame.f_locals["prediction_loss_only"])
                elif code.co_name == "generate":
                    keeps_loss_only = False
                elif code.co_name == "forward" and has_labels is None and _takes(code, "labels"):
                    has_labels = frame.f_locals.get("labels") is not None
                elif code.co_name == "_wrapped_call_impl" and _FSDP in sys.modules:
                    has_fsdp |= any(kind.__module__.startswith(_FSDP) for kind in type(frame.f_locals["self"]).__mro__)
            frame = frame.f_back
        of_loop = LABELS if has_labels and keeps_loss_only is None else None
        return cls(TRAINER if keeps_loss_only else of_loop, bool(has_labels), has_fsdp)


def _takes(code: CodeType, name: str) -> bool:
    return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
