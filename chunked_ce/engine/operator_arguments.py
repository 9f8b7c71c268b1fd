"""What the operators of statistics and of losses share: their arguments, and how their gradients are returned."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.specification import decoded, encoded
from chunked_ce.rows.statistics import zero_statistics

__all__ = [
    "call_from",
    "fake_statistics",
    "filled",
    "gradients_of",
    "needed_of",
    "plain_gradients",
    "rest_of",
    "restored_extra",
    "saved_extra",
]


def rest_of(call: Call) -> tuple[Tensor | None, Tensor, int, str]:
    return call.class_weight, call.target, call.ignore_index, encoded(call.specification)


def call_from(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> Call:
    return Call(source, class_weight, target, ignore_index, decoded(specification), extra)


def saved_extra(ctx: Any, extra: Sequence[Tensor]) -> list[Tensor | None]:
    """Constant tensors for ``save_for_backward``, which refuses those of inference mode: the context keeps them."""
    ctx.of_inference = {at: tensor for at, tensor in enumerate(extra) if tensor.is_inference()}
    return [None if at in ctx.of_inference else tensor for at, tensor in enumerate(extra)]


def restored_extra(ctx: Any, extra: Sequence[Tensor | None]) -> list[Tensor]:
    return [ctx.of_inference.get(at, tensor) for at, tensor in enumerate(extra)]


def needed_of(ctx: Any) -> list[bool]:
    """Which tensors of the source need a gradient: an operator takes them as its first argument, a list; a function
    takes them as its last ones."""
    first, *rest = ctx.needs_input_grad
    return list(first) if isinstance(first, list | tuple) else rest


def fake_statistics(call: Call) -> list[Tensor]:
    specification, target = call.specification, call.target
    dtype = specification.settings.compute_dtype
    rows = zero_statistics(target.shape[0], specification.names, dtype, target.device, call.num_ids)
    return list(rows.named().values())


def filled(grads: Sequence[Tensor | None], source: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a source, empty where not needed, since an operator returns only tensors."""
    pairs = zip(grads, source, strict=True)
    return [tensor.new_empty(0) if grad is None else grad for grad, tensor in pairs]


def plain_gradients(
    outputs: Callable[[], list[Tensor]], upstream: Sequence[Tensor], call: Call, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients through the plain graph of ``outputs``, differentiable if a graph of the backward is wanted."""
    if call.specification.shard is not None:
        raise NotImplementedError("vocab: no derivatives of derivatives (create_graph=True) with a sharded vocabulary")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        pairs = list(zip(outputs(), upstream, strict=True))
    return gradients_of(pairs, call.tensors, needed, create_graph=create_graph, materialize_grads=True)


def gradients_of(
    pairs: Sequence[tuple[Tensor, Tensor]], source: Sequence[Tensor], needed: Sequence[bool], **keywords: bool
) -> list[Tensor | None]:
    outputs, upstream = zip(*pairs, strict=True)
    leaves = [tensor for tensor, need in zip(source, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(outputs, leaves, upstream, **keywords))
    return [next(gradients) if need else None for need in needed]
