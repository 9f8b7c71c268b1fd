"""What ranks that share a vocabulary say of a call before they work on it together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.meeting import Doing

__all__ = ["doing"]


def doing(
    call: Call,
    number: int | None = None,
    *others: Tensor,  # (N, ...) per token
) -> Doing:
    """What decides the collectives of a forward, or of the backward of call ``number``, and what they mean."""
    specification = call.specification
    settings, shard, teacher = specification.settings, not_none(specification.shard), specification.teacher
    per_token = [call.target, *call.per_token.values(), *others]
    facts: dict[str, Any] = {
        "statistics": specification.names,
        "objective": str(specification.objective),
        "logits": specification.logits,
        "gradients": (specification.needed, specification.slopes),
        "hidden states": (specification.parts, call.chunk_widths()),
        "tensors per token": ("target", *specification.per_token),
        "their dtypes and widths": [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in per_token],
        "options": settings._replace(ignored="mask" if settings.ignored == "mask" else "drop"),
        "vocab": (shard.total, shard.input_grad, shard.reduce_dtype, shard.tokens),
    }
    if not shard.is_own:
        facts["number of tokens"] = len(call.target)
    if teacher is not None:
        # With the same tokens, each rank has its own columns of logits that exist.
        of_tokens = [name for name in teacher.parts if name in ("hidden", *["logits", "probabilities"] * shard.is_own)]
        facts["teacher"] = teacher[1:], [(name, tuple(call.teacher[name].shape[1:])) for name in of_tokens]
    what = "statistics" if specification.objective is None else type(specification.objective).__name__
    if number is None:
        return Doing(f"the start of the forward of {what}", facts, starts_call=True)
    return Doing(f"the start of the backward of {what}", facts, number)
