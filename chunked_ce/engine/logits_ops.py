"""The loss of logits that exist as operators that autograd and ``torch.compile`` know."""

import torch
from torch import Tensor

from chunked_ce.engine import in_step, logits, plain
from chunked_ce.engine.flat import (
    differentiable,
    fake_statistics,
    filled,
    flat_shard,
    no_autocast,
    only_wanted,
    plain_gradients,
    refuse_shard,
    shard_of,
    slopes_or_zero,
    upstream_of_wanted,
)
from chunked_ce.engine.rows import Slopes, Wanted
from chunked_ce.engine.sharded import Shard
from chunked_ce.objective import Logits, RowStatistics

__all__ = ["logits_statistics"]


def logits_statistics(
    products: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    ignore_index: int,
    wanted: Wanted,
    backend: str = "auto",
    shard: Shard | None = None,
) -> RowStatistics:
    """The statistics of the rows of logits that exist, differentiable; (N,) each and 0 where ignored."""
    found = _logits_statistics(
        products, target, class_weight, *logits, ignore_index, list(wanted), backend, *flat_shard(shard)
    )
    return RowStatistics(*found[:3], *only_wanted(found[3:], wanted))


@torch.library.custom_op("chunked_ce::logits_statistics", mutates_args=())
def _logits_statistics(
    products: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    wanted: list[bool],
    backend: str,
    group_name: str | None,
    start: int,
    total: int,
    input_grad: str,
    reduce_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shard = shard_of(group_name, start, total, input_grad, reduce_dtype)
    arguments = (products, target, class_weight, Logits(scale, softcap), ignore_index, Wanted(*wanted), backend)
    with no_autocast(products.device):
        found = logits.statistics(*arguments) if shard is None else in_step.logits_statistics(*arguments, shard)
    return filled(found, found.log_sum)


@_logits_statistics.register_fake
def _(products, target, class_weight, scale, softcap, ignore_index, wanted, *_):
    return fake_statistics(products.shape[0], products.dtype, products.device, wanted)


@torch.library.custom_op("chunked_ce::logits_gradients", mutates_args=())
def _logits_gradients(
    products: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    at_target: Tensor,
    mean: Tensor,
    log_sum_slope: Tensor,
    target_slope: Tensor,
    weighted_slope: Tensor | None,
    mean_slope: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    start: int,
    total: int,
) -> Tensor:
    known = RowStatistics(maximum, log_sum, at_target, mean=None if mean_slope is None else mean)
    slopes = Slopes(log_sum_slope, target_slope, weighted_slope, mean_slope)
    with no_autocast(products.device):
        return logits.gradients(
            products, target, class_weight, Logits(scale, softcap), known, slopes, ignore_index, backend, (start, total)
        )


@_logits_gradients.register_fake
def _(products, *_):
    return torch.empty_like(products)


def _save_logits_statistics(ctx, inputs, output):
    products, target, class_weight, *ctx.settings = inputs
    ctx.inputs = len(inputs)
    maximum, log_sum, at_target, _, mean, correct = output
    ctx.save_for_backward(products, target, class_weight, maximum, log_sum, at_target, mean)
    ctx.mark_non_differentiable(maximum, correct)
    ctx.set_materialize_grads(False)


def _backward_of_logits_statistics(ctx, _maximum, *upstream):
    products, target, class_weight, maximum, log_sum, at_target, mean = ctx.saved_tensors
    scale, softcap, ignore_index, wanted, backend = ctx.settings[:5]
    shard = shard_of(*ctx.settings[5:])
    upstream = upstream_of_wanted(upstream, wanted)
    if torch.is_grad_enabled():
        refuse_shard(shard)
        found = plain.logits_statistics(
            products, target, class_weight, Logits(scale, softcap), ignore_index, Wanted(*wanted)
        )
        (grad,) = plain_gradients(differentiable(found), upstream, [products], [True])
    else:
        vocab_size = products.shape[-1]
        grad = _logits_gradients(
            products,
            target,
            class_weight if shard is None else shard.classes(class_weight, vocab_size),
            maximum,
            log_sum,
            at_target,
            mean,
            *slopes_or_zero(upstream, log_sum),
            scale,
            softcap,
            ignore_index,
            backend,
            *((0, vocab_size) if shard is None else (shard.start, shard.total)),
        )
    return (grad, *[None] * (ctx.inputs - 1))


_logits_statistics.register_autograd(_backward_of_logits_statistics, setup_context=_save_logits_statistics)
