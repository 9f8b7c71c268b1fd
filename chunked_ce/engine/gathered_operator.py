"""`chunked_ce.engine.gathered` as an operator for autograd and ``torch.compile``.

Second derivatives and ``torch.func`` transforms go through `gathered.plain_logits`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce.engine import gathered, in_step
from chunked_ce.engine.call import Call
from chunked_ce.engine.released_parameters import check_head_still_there
from chunked_ce.engine.specification import decoded, encoded
from chunked_ce.rows.statistics import work_dtype
from chunked_ce.tracing import is_batched, no_autocast

__all__ = ["logits"]


def logits(call: Call) -> Tensor:
    """`gathered.logits`, (N, M), differentiable."""
    arguments = list(call.extra), call.target, call.ignore_index, encoded(call.specification)
    outputs: Tensor = _logits(list(call.tensors), *arguments)
    return outputs


def _call(
    source: Sequence[Tensor], ids: Sequence[Tensor], target: Tensor, ignore_index: int, specification: str
) -> Call:
    return Call(source, None, target, ignore_index, decoded(specification), ids)


@torch.library.custom_op("chunked_ce::gathered_logits", mutates_args=())
def _logits(
    source: Sequence[Tensor], ids: Sequence[Tensor], target: Tensor, ignore_index: int, specification: str
) -> Tensor:
    call = _call(source, ids, target, ignore_index, specification)
    with no_autocast(target.device):
        return (gathered.logits if call.specification.shard is None else in_step.gathered_logits)(call)


@_logits.register_fake
def _(source: Sequence[Tensor], ids: Sequence[Tensor], target: Tensor, ignore_index: int, specification: str) -> Tensor:
    call = _call(source, ids, target, ignore_index, specification)
    num_ids = sum([part.shape[1] for part in call.per_token.values()])
    dtype = work_dtype(call.specification.settings.compute_dtype)
    return source[0].new_empty((target.shape[0], num_ids), dtype=dtype)


@torch.library.custom_op("chunked_ce::gathered_gradients", mutates_args=())
def _gradients(
    source: Sequence[Tensor],
    upstream: Tensor,
    ids: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = _call(source, ids, target, ignore_index, specification)
    with no_autocast(target.device):
        shard = call.specification.shard
        grads = (gathered.gradients if shard is None else in_step.gathered_gradients)(call, upstream)
    return [like.new_empty(0) if grad is None else grad for grad, like in zip(grads, source, strict=True)]


@_gradients.register_fake
def _(
    source: Sequence[Tensor],
    upstream: Tensor,
    ids: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    needed = decoded(specification).needed
    return [part.new_empty(part.shape if need else 0) for part, need in zip(source, needed, strict=True)]


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    source, ids, target, ctx.ignore_index, text = inputs
    ctx.specification, ctx.size, ctx.shapes = decoded(text), len(source), [part.shape for part in source]
    ctx.save_for_backward(*source, *ids, target)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    *saved, target = ctx.saved_tensors
    source, ids, needed = saved[: ctx.size], saved[ctx.size :], list(ctx.needs_input_grad[0])
    check_head_still_there(ctx.specification.parts, source, ctx.shapes, is_read=True)
    specification = ctx.specification._replace(needed=tuple(needed))
    call = Call(source, None, target, ctx.ignore_index, specification, ids)
    if torch.is_grad_enabled() or is_batched(upstream):
        grads = _plain_gradients(call, upstream)
    else:
        arguments = ids, target, ctx.ignore_index, encoded(specification)
        grads = _gradients(source, upstream, *arguments)
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)], [None] * len(ids), *[None] * 3


_logits.register_autograd(_backward, setup_context=_save)


def _plain_gradients(call: Call, upstream: Tensor) -> list[Tensor | None]:
    """Gradients that are differentiable themselves if a graph of the backward is wanted."""
    if call.specification.shard is not None:
        raise NotImplementedError("vocab: no derivatives of derivatives (create_graph=True) with a sharded vocabulary")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = gathered.plain_logits(call)
    needed = call.specification.needed
    leaves = [tensor for tensor, need in zip(call.tensors, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(outputs, leaves, upstream, create_graph=create_graph))
    return [next(grads) if need else None for need in needed]
