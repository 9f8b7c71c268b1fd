"""The chunk loops as operators that autograd and ``torch.compile`` know.

Derivatives of derivatives go through `chunked_ce.engine.plain`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.engine import in_step, linear, plain
from chunked_ce.engine.accumulation import destination, leaf_to_keep
from chunked_ce.engine.backprop import Gradients, Targets
from chunked_ce.engine.counted import columns_of
from chunked_ce.engine.device_memory import with_smaller_chunks
from chunked_ce.engine.flat import (
    differentiable,
    fake_gradients,
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
from chunked_ce.engine.kernels import row_kernels
from chunked_ce.engine.linear import Head, Settings
from chunked_ce.engine.presence import check_still_there
from chunked_ce.engine.products import unrounded
from chunked_ce.engine.rows import Slopes, Wanted
from chunked_ce.engine.sharded import Shard
from chunked_ce.engine.tracing import is_recorded
from chunked_ce.objective import Logits, Objective, RowStatistics

__all__ = ["linear_loss", "linear_statistics"]

# Every operator takes the fields of `Settings` and then those of `Shard` as its last arguments.
_SHARD = slice(-len(Shard._fields), None)
_SETTINGS = slice(-len(Settings._fields) - len(Shard._fields), _SHARD.start)
_BEFORE = slice(None, _SETTINGS.start)


def _apart(arguments: Sequence[Any]) -> tuple[Sequence[Any], Settings, Shard | None]:
    """The arguments of an operator before its settings and shard, and these two."""
    return arguments[_BEFORE], Settings(*arguments[_SETTINGS]), shard_of(*arguments[_SHARD])


def linear_statistics(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    ignore_index: int,
    wanted: Wanted,
    settings: Settings,
    shard: Shard | None = None,
) -> RowStatistics:
    """`chunked_ce.engine.linear.statistics`, differentiable: the backward way."""
    found = _linear_statistics(
        hidden,
        head.weight,
        head.bias,
        target,
        head.class_weight,
        *head.logits,
        ignore_index,
        list(wanted),
        *settings,
        *flat_shard(shard),
    )
    return RowStatistics(*found[:3], *only_wanted(found[3:], wanted))


def linear_loss(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    coefficient: Tensor,  # (N,) float64
    objective: Objective,
    ignore_index: int,
    wanted: Wanted,
    needed: tuple[bool, bool, bool],
    settings: Settings,
    shard: Shard | None = None,
) -> tuple[Tensor, RowStatistics]:
    """`chunked_ce.engine.linear.loss_and_gradients`, differentiable: the forward way. The statistics are not."""
    loss, _, _, _, _, *found = _linear_loss(
        hidden,
        head.weight,
        head.bias,
        target,
        head.class_weight,
        coefficient,
        *head.logits,
        objective.label_smoothing,
        objective.z_loss,
        ignore_index,
        list(wanted),
        list(needed),
        *settings,
        *flat_shard(shard),
    )
    return loss, RowStatistics(*found[:3], *only_wanted(found[3:], wanted))


def _check_head(
    weight: Tensor | None, bias: Tensor | None, shapes: Sequence[torch.Size | None], *, is_read: bool
) -> None:
    """Whether the backward finds the tensors of a head as the forward left them."""
    for name, tensor, shape in zip(("linear_weight", "linear_bias"), (weight, bias), shapes, strict=True):
        check_still_there(name, tensor, shape, is_read=is_read)


# ---- the backward way: statistics now, gradients from logits formed again ----


@torch.library.custom_op("chunked_ce::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    wanted: list[bool],
    compute_dtype: torch.dtype,
    accumulate_dtype: torch.dtype,
    chunk_size: int | None,
    memory_budget: int | None,
    backend: str,
    gradient_filter: float | None,
    accumulate_into: str | None,
    head_sum_dtype: torch.dtype | None,
    group_name: str | None,
    start: int,
    total: int,
    input_grad: str,
    reduce_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, Logits(scale, softcap), class_weight)
    settings = Settings(
        compute_dtype,
        accumulate_dtype,
        chunk_size,
        memory_budget,
        backend,
        gradient_filter,
        accumulate_into,
        head_sum_dtype,
    )
    shard = shard_of(group_name, start, total, input_grad, reduce_dtype)
    arguments = (hidden, head, target, ignore_index, Wanted(*wanted))
    with no_autocast(hidden.device):
        if shard is None:
            run = functools.partial(linear.statistics, *arguments)
            found = with_smaller_chunks(run, settings, target, weight, unit="words")
        else:
            found = in_step.statistics(*arguments, settings, shard)
    return filled(found, found.log_sum)


@_linear_statistics.register_fake
def _(hidden, weight, bias, target, class_weight, scale, softcap, ignore_index, wanted, compute_dtype, *_):
    return fake_statistics(target.shape[0], compute_dtype, hidden.device, wanted)


@torch.library.custom_op("chunked_ce::linear_gradients", mutates_args=())
def _linear_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    needed: list[bool],
    compute_dtype: torch.dtype,
    accumulate_dtype: torch.dtype,
    chunk_size: int | None,
    memory_budget: int | None,
    backend: str,
    gradient_filter: float | None,
    accumulate_into: str | None,
    head_sum_dtype: torch.dtype | None,
    group_name: str | None,
    start: int,
    total: int,
    input_grad: str,
    reduce_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, Logits(scale, softcap), class_weight)
    known = RowStatistics(maximum, log_sum, at_target, mean=mean if mean_slope is not None else None)
    slopes = Slopes(log_sum_slope, target_slope, weighted_slope, mean_slope)
    settings = Settings(
        compute_dtype,
        accumulate_dtype,
        chunk_size,
        memory_budget,
        backend,
        gradient_filter,
        accumulate_into,
        head_sum_dtype,
    )
    shard = shard_of(group_name, start, total, input_grad, reduce_dtype)
    arguments = (hidden, head, target, known, slopes, ignore_index, tuple(needed))
    if shard is not None:
        return filled(_gradients(*arguments, settings, shard=shard), hidden)
    run = functools.partial(_gradients, *arguments, shard=None)
    # The filter works on chunks of tokens. Whether there is one does not depend on the words of the head.
    no_words = head._replace(weight=weight[:0], class_weight=None)
    smoothed, entropy = weighted_slope is not None, mean_slope is not None
    filtered = linear.new_filter(no_words, settings, smoothed=smoothed, entropy=entropy) is not None
    unit, sums_head = ("tokens", needed[1]) if filtered else ("words", False)
    return filled(with_smaller_chunks(run, settings, target, weight, unit=unit, sums_head=sums_head), hidden)


def _gradients(hidden: Tensor, *arguments, shard: Shard | None, weight_sum: Tensor | None = None) -> Gradients:
    with no_autocast(hidden.device):
        if shard is None:
            return linear.gradients(hidden, *arguments, weight_sum=weight_sum)
        return in_step.gradients(hidden, *arguments, shard, weight_sum=weight_sum)


@_linear_gradients.register_fake
def _(hidden, weight, bias, *rest):
    (*_, needed), _, _ = _apart(rest)
    return fake_gradients((hidden, weight, bias), (None, None, None), needed)


def _save_linear_statistics(ctx, inputs, output):
    hidden, weight, bias, target, class_weight, *ctx.numbers = inputs
    _, settings, _ = _apart(inputs)
    ctx.leaf = leaf_to_keep(weight, settings.accumulate_into)
    ctx.inputs = len(inputs)
    ctx.head_shapes = [None if tensor is None else tensor.shape for tensor in inputs[1:3]]
    maximum, log_sum, at_target, _, mean, correct = output
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, maximum, log_sum, at_target, mean)
    ctx.mark_non_differentiable(maximum, correct)
    ctx.set_materialize_grads(False)


def _backward_of_linear_statistics(ctx, _maximum, *upstream):
    hidden, weight, bias, target, class_weight, maximum, log_sum, at_target, mean = ctx.saved_tensors
    (scale, softcap, ignore_index, wanted), settings, shard = _apart(ctx.numbers)
    upstream = upstream_of_wanted(upstream, wanted)
    needed = list(ctx.needs_input_grad[:3])
    _check_head(weight, bias, ctx.head_shapes, is_read=True)
    needed[1], weight_sum = destination(ctx.leaf, weight, settings.accumulate_into, needed[1])
    if torch.is_grad_enabled():
        refuse_shard(shard)
        head = Head(weight, bias, Logits(scale, softcap), class_weight)
        found = plain.linear_statistics(hidden, head, target, ignore_index, Wanted(*wanted), settings.compute_dtype)
        grads = plain_gradients(differentiable(found), upstream, (hidden, weight, bias), needed)
    elif weight_sum is not None:
        # Not an operator: it changes what is no argument of it.
        slopes = Slopes(*slopes_or_zero(upstream, log_sum))
        known = RowStatistics(maximum, log_sum, at_target, mean=mean if slopes.mean is not None else None)
        head = Head(weight, bias, Logits(scale, softcap), class_weight)
        arguments = (hidden, head, target, known, slopes, ignore_index, tuple(needed), settings)
        grads = _gradients(*arguments, shard=shard, weight_sum=weight_sum)
    else:
        grads = _linear_gradients(
            hidden,
            weight,
            bias,
            target,
            class_weight,
            maximum,
            log_sum,
            at_target,
            mean,
            *slopes_or_zero(upstream, log_sum),
            scale,
            softcap,
            ignore_index,
            needed,
            *settings,
            *flat_shard(shard),
        )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * (ctx.inputs - 3))


_linear_statistics.register_autograd(_backward_of_linear_statistics, setup_context=_save_linear_statistics)


# ---- the forward way: gradients with the loss, rescaled in the backward ----


@torch.library.custom_op("chunked_ce::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    coefficient: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    wanted: list[bool],
    needed: list[bool],
    compute_dtype: torch.dtype,
    accumulate_dtype: torch.dtype,
    chunk_size: int | None,
    memory_budget: int | None,
    backend: str,
    gradient_filter: float | None,
    accumulate_into: str | None,
    head_sum_dtype: torch.dtype | None,
    group_name: str | None,
    start: int,
    total: int,
    input_grad: str,
    reduce_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shard = shard_of(group_name, start, total, input_grad, reduce_dtype)
    arguments = (
        hidden,
        Head(weight, bias, Logits(scale, softcap), class_weight),
        target,
        coefficient,
        Objective(label_smoothing, z_loss, weight.shape[0] if shard is None else total),
        ignore_index,
        Wanted(*wanted),
        tuple(needed),
    )
    settings = Settings(
        compute_dtype,
        accumulate_dtype,
        chunk_size,
        memory_budget,
        backend,
        gradient_filter,
        accumulate_into,
        head_sum_dtype,
    )
    with no_autocast(hidden.device):
        if shard is None:
            run = functools.partial(linear.loss_and_gradients, *arguments)
            loss, grads, targets, found = with_smaller_chunks(run, settings, target, weight, sums_head=needed[1])
            # Smaller chunks may be summed in another dtype than was planned.
            sum_dtype = _head_sum_dtype(target, weight, needed, settings, shard)
            grads = grads if grads.weight is None else grads._replace(weight=grads.weight.to(sum_dtype))
        else:
            loss, grads, targets, found = in_step.loss_and_gradients(*arguments, settings, shard)
    return loss, *filled((*grads, targets), hidden), *filled(found, found.log_sum)


@_linear_loss.register_fake
def _(hidden, weight, bias, target, *rest):
    (*_, wanted, needed), settings, shard = _apart(rest)
    found = fake_statistics(target.shape[0], settings.compute_dtype, hidden.device, wanted)
    total_dtype = _head_sum_dtype(target, weight, needed, settings, shard)
    dtypes = unrounded(hidden.dtype), total_dtype, torch.promote_types(total_dtype, settings.accumulate_dtype)
    grads = fake_gradients((hidden, weight, bias), dtypes, needed)
    later = needed[1] and linear.keeps_targets(hidden, total_dtype, target.shape[0], settings)
    targets = hidden.new_empty(target.shape if later else 0, dtype=torch.float32 if later else None)
    return found[0].new_empty(()), *grads, targets, *found


def _head_sum_dtype(
    target: Tensor, weight: Tensor, needed: list[bool], settings: Settings, shard: Shard | None
) -> torch.dtype:
    if settings.head_sum_dtype is not None:  # sizes may be symbols, which no plan compares
        return settings.head_sum_dtype
    shape, in_flight = (weight.shape, 1) if shard is None else (shard.planned_shape(weight), 2)
    head_dtype = weight.dtype if needed[1] else None
    return plan.head_sum_dtype(target.shape[0], *shape, head_dtype=head_dtype, in_flight=in_flight, **settings.planned)


def _save_linear_loss(ctx, inputs, output):
    before, settings, ctx.shard = _apart(inputs)
    *tensors, scale, softcap, label_smoothing, z_loss, ignore_index, _, ctx.prepared = before
    objective = Objective(label_smoothing, z_loss, inputs[1].shape[0] if ctx.shard is None else ctx.shard.total)
    ctx.maths = Logits(scale, softcap), objective, ignore_index
    ctx.settings = settings
    ctx.inputs = len(inputs)
    ctx.head_shapes = [None if tensor is None else tensor.shape for tensor in inputs[1:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:5])
    ctx.set_materialize_grads(False)


def _backward_of_linear_loss(ctx, grad, *_):
    none = [None] * (ctx.inputs - 3)
    if grad is None:
        return (None, None, None, *none)
    *tensors, hidden_grad, weight_grad, bias_grad, targets = ctx.saved_tensors
    hidden, weight, bias, target, class_weight, coefficient = tensors
    needed = list(ctx.needs_input_grad[:3])
    _check_head(weight if needed[1] else None, bias if needed[2] else None, ctx.head_shapes, is_read=False)
    if torch.is_grad_enabled():
        refuse_shard(ctx.shard)
        logits_of, objective, ignore_index = ctx.maths
        head = Head(weight, bias, logits_of, class_weight)
        dtype = ctx.settings.compute_dtype
        loss = plain.linear_loss(hidden, head, target, coefficient, objective, ignore_index, dtype)
        return (*plain_gradients([loss], [grad], (hidden, weight, bias), needed), *none)
    if any(need and not had for need, had in zip(needed, ctx.prepared, strict=True)):
        return (*_unprepared_gradients(ctx, tensors, grad, needed), *none)
    rows = None
    if needed[1] and targets.numel() > 0:
        column = columns_of(target, 0 if ctx.shard is None else ctx.shard.start, weight_grad.shape[0], targets != 0)
        words, rows = Targets(column, targets).summed_rows(weight_grad, hidden, ctx.settings.compute_dtype)
    saved = Gradients(hidden_grad, weight_grad, bias_grad)
    grads = [
        _rescaled(total, grad, like.dtype, ctx.settings.backend) if need else None
        for total, like, need in zip(saved, (hidden, weight, bias), needed, strict=True)
    ]
    if rows is not None:
        grads[1].index_copy_(0, words, (rows * grad).to(grads[1].dtype))
    return (*grads, *none)


def _unprepared_gradients(
    ctx, tensors: Sequence[Tensor | None], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by the backward way: an exported graph is run with tensors that need others than when it was traced."""
    *leaves, target, class_weight, coefficient = tensors
    logits_of, objective, ignore_index = ctx.maths
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
        head = Head(*leaves[1:], logits_of, class_weight)
        wanted = Wanted(weighted=objective.label_smoothing > 0)
        found = linear_statistics(leaves[0], head, target, ignore_index, wanted, ctx.settings, ctx.shard)
        found = found.map(Tensor.double)
        loss = objective.token_losses(found, target, ignore_index, class_weight, coefficient).sum()
    wanted_leaves = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    found_grads = iter(torch.autograd.grad(loss, wanted_leaves, grad.to(loss.dtype)))
    return [next(found_grads) if need else None for need in needed]


_linear_loss.register_autograd(_backward_of_linear_loss, setup_context=_save_linear_loss)


def _rescaled(
    total: Tensor,
    factor: Tensor,  # ()
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """``factor * total`` in ``dtype``: in the memory of ``total`` if the graph ends with this backward."""
    if type(total) is not Tensor or is_recorded():
        return (total * factor).to(dtype)  # traced by a compiler, which places memory itself
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    out = total if last and total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    return row_kernels(backend, total.device, total.dtype).scale_into(total, factor, out)
