"""`chunked_ce.engine.sweep.loss_and_gradients` as an operator for autograd and ``torch.compile``.

Its backward multiplies the gradients that the forward has computed by the upstream gradient. As in
`chunked_ce.engine.statistics_operator`, the same functions are called directly where nothing records operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from chunked_ce.devices import unrounded
from chunked_ce.engine import in_step, plain, sweep
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import columns_of
from chunked_ce.engine.device_filter import HeadTerms
from chunked_ce.engine.device_memory import with_smaller_chunks
from chunked_ce.engine.gradient_products import Gradient, TargetGradients
from chunked_ce.engine.head_gradients import HIDDEN_PARTS
from chunked_ce.engine.operator_arguments import (
    call_from,
    fake_statistics,
    filled,
    gradients_of,
    needed_of,
    plain_gradients,
    rest_of,
    restored_extra,
    saved_extra,
)
from chunked_ce.engine.released_parameters import check_head_still_there
from chunked_ce.engine.specification import decoded
from chunked_ce.engine.statistics_operator import statistics
from chunked_ce.engine.totals import keeps_targets
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.plan import Plan
from chunked_ce.rows.backend import row_kernels
from chunked_ce.rows.statistics import RowStatistics, work_dtype
from chunked_ce.tracing import is_batched, is_recorded, no_autocast, runs_at_once

__all__ = ["loss"]


def loss(call: Call) -> tuple[Tensor, RowStatistics]:
    """`chunked_ce.engine.sweep.loss_and_gradients`, differentiable; the statistics are not."""
    arguments = list(call.extra), *rest_of(call)
    if runs_at_once(*call.tensors):
        outputs: Sequence[Tensor] = _Loss.apply(arguments, *call.tensors)  # type: ignore[no-untyped-call]
    else:
        outputs = _loss(list(call.tensors), *arguments)
    names = call.specification.names
    return outputs[0], RowStatistics(**dict(zip(names, outputs[-len(names) :], strict=True)))


def _run_loss(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    """The loss, the gradients of the source, those of the targets' logits, and the statistics of every row."""
    return _loss_and_terms(source, extra, class_weight, target, ignore_index, specification, keeps_terms=False)[0]


def _loss_and_terms(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
    *,
    keeps_terms: bool,
) -> tuple[list[Tensor], HeadTerms | None]:
    """The outputs of `_run_loss`. With ``keeps_terms``, the gradient of the weight may be returned apart, as the terms
    of a sum, and is empty among the outputs."""
    call = call_from(source, extra, class_weight, target, ignore_index, specification)
    with no_autocast(target.device):
        if call.specification.shard is None:

            def plan() -> Plan:
                return call.plan_by_tokens(len(target), sums_head=call.sums_head)

            outputs = with_smaller_chunks(sweep.loss_and_gradients, call, plan)
        else:
            outputs = in_step.loss_and_gradients(call)
    loss, grads, targets, rows = outputs
    at, terms = call.specification.parts.index("weight"), None
    of_weight = grads[at]
    if keeps_terms and isinstance(of_weight, HeadTerms):
        terms, of_weight = of_weight, None
    if of_weight is not None:  # smaller chunks may have another sum dtype than planned
        of_weight = of_weight.to(_head_sum_dtype(call))
    grads[at] = of_weight
    formed = [None if isinstance(grad, HeadTerms) else grad for grad in grads]
    targets = loss.new_empty(0, dtype=torch.float32) if targets is None else targets
    return [loss, *filled(formed, source), targets, *rows.named().values()], terms


_loss = torch.library.custom_op("chunked_ce::loss", _run_loss, mutates_args=())


@_loss.register_fake
def _(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = call_from(source, extra, class_weight, target, ignore_index, specification)
    needed, settings = call.specification.needed, call.specification.settings
    total_dtype = _head_sum_dtype(call)
    sums = {"weight": total_dtype, "bias": torch.promote_types(total_dtype, settings.accumulate_dtype)}
    sums["adapter_weight"] = settings.wide_dtype
    grads = [
        tensor.new_empty(tensor.shape, dtype=sums.get(part) or unrounded(tensor.dtype)) if need else None
        for part, tensor, need in zip(call.specification.parts, source, needed, strict=True)
    ]
    later = keeps_targets(call, total_dtype)
    targets = target.new_empty(target.shape if later else 0, dtype=torch.float32)
    rows = fake_statistics(call)
    return [rows[0].new_empty(()), *filled(grads, source), targets, *rows]


def _head_sum_dtype(call: Call) -> torch.dtype:
    settings = call.specification.settings
    if settings.head_sum_dtype is not None:  # sizes may be symbols, which a plan cannot compare
        return settings.head_sum_dtype
    return call.plan_by_tokens(len(call.target), sums_head=call.sums_head).head_sum


def _save_loss(ctx: Any, inputs: Any, output: Sequence[Tensor], terms: HeadTerms | None = None) -> None:
    source, extra, class_weight, target, ctx.ignore_index, text = inputs
    ctx.specification = decoded(text)
    ctx.sizes, ctx.number = (len(source), len(extra)), 0
    ctx.head_shapes = [tensor.shape for tensor in source]
    _, *grads = output[: len(source) + 2]  # and those of the targets' logits
    ctx.filter_kernels, *of_head = (None,) if terms is None else terms
    ctx.save_for_backward(*source, *saved_extra(ctx, extra), class_weight, target, *grads, *of_head)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_loss(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    num_tensors, num_extra = ctx.sizes
    grad, none = upstream[0], ([None] * num_extra, None, None, None, None)
    if grad is None:
        return [None] * num_tensors, *none
    saved = iter(ctx.saved_tensors)
    source, extra = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    extra = restored_extra(ctx, extra)
    class_weight, target, *totals = saved
    totals, (targets, *of_head) = totals[:num_tensors], totals[num_tensors:]
    specification, needed = ctx.specification, needed_of(ctx)
    read = [tensor if need else None for tensor, need in zip(source, needed, strict=True)]
    check_head_still_there(specification.parts, read, ctx.head_shapes, is_read=False)
    call = Call(source, class_weight, target, ctx.ignore_index, specification, extra)
    if torch.is_grad_enabled() or is_batched(grad):
        return plain_gradients(lambda: [plain.loss(call)], [grad], call, needed), *none
    known = not any(need and not had for need, had in zip(needed, specification.needed, strict=True))
    is_own = specification.shard is not None and specification.shard.is_own
    of_targets, at = None, specification.parts.index("weight")
    if of_head and needed[at]:
        totals[at] = HeadTerms(ctx.filter_kernels, *of_head)
    if is_own and runs_at_once(*source):
        return _of_own_tokens(call, totals, grad, needed, ctx.number, known=known), *none
    if not known:
        return _unprepared_gradients(call, grad, needed), *none
    if is_own:
        call = call._replace(specification=specification._replace(needed=tuple(needed)))
        return _own_gradients(list(source), totals, grad, list(extra), *rest_of(call)), *none
    if needed[at] and targets.numel() > 0 and not of_head:
        column = columns_of(target, call.start, call.rows, targets != 0)
        terms = TargetGradients(column, targets)
        (hidden,) = call.named("hidden")
        of_targets = terms.summed_rows(totals[at], hidden, specification.settings.compute_dtype)
    backend = specification.settings.backend
    grads: list[Any] = [
        _rescaled(total, grad, tensor.dtype, backend) if need else None
        for total, tensor, need in zip(totals, source, needed, strict=True)
    ]
    if of_targets is not None:
        entries, rows = of_targets
        grads[at].index_copy_(0, entries, (rows * grad).to(grads[at].dtype))
    return grads, *none


def _of_own_tokens(
    call: Call,
    totals: list[Gradient | None],
    grad: Tensor,
    needed: Sequence[bool],
    number: int = 0,  # of the call
    *,
    known: bool = True,  # whether there are ``totals`` for all that is needed
) -> list[Tensor | None]:
    """The gradients where each rank has tokens of its own: the loss of each has its own upstream gradient.

    Where these differ, the sums over all ranks' tokens have no common factor: they are computed again, with the
    upstream gradients in the coefficients of the tokens.
    """
    if not in_step.common_factor(call, grad, number, known=known):
        totals.clear()
        per_token = call.per_token
        call = call.with_per_token(per_token | {"_coefficient": per_token["_coefficient"] * grad}, needed=tuple(needed))
        with no_autocast(call.target.device):
            _, totals, _, _ = in_step.loss_and_gradients(call)
        grad = torch.ones_like(grad)
    backend, shard = call.specification.settings.backend, not_none(call.specification.shard)
    of_head = grad / Collectives(shard.group_name).size
    grads: list[Tensor | None] = []
    for part, total, tensor, need in zip(call.specification.parts, totals, call.tensors, needed, strict=True):
        factor = grad if part in HIDDEN_PARTS else of_head
        assert total is not None or not need
        grads.append(None if total is None or not need else _rescaled(total, factor, tensor.dtype, backend))
    return grads


@torch.library.custom_op("chunked_ce::own_gradients", mutates_args=())
def _own_gradients(
    source: Sequence[Tensor],
    totals: Sequence[Tensor],
    grad: Tensor,
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = call_from(source, extra, class_weight, target, ignore_index, specification)
    copies: list[Gradient | None] = [*map(torch.clone, totals)]  # an operator returns no memory of its arguments
    return filled(_of_own_tokens(call, copies, grad, call.specification.needed), source)


@_own_gradients.register_fake
def _(
    source: Sequence[Tensor],
    totals: Sequence[Tensor],
    grad: Tensor,
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    needed = decoded(specification).needed
    grads = [tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(source, needed, strict=True)]
    return filled(grads, source)


def _unprepared_gradients(call: Call, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients by recomputation: an exported graph runs with tensors that need other gradients than when traced."""
    objective, dtype = call.specification.objective, call.specification.settings.compute_dtype
    with torch.enable_grad():
        source = [x.detach().requires_grad_(need) for x, need in zip(call.tensors, needed, strict=True)]
        rows = statistics(call.for_statistics()._replace(tensors=source)).map(Tensor.double)
        arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size, call.per_token
        loss = not_none(objective).losses(rows, *arguments).sum().to(work_dtype(dtype))
    return gradients_of([(loss, grad)], source, needed)


_loss.register_autograd(_backward_of_loss, setup_context=_save_loss)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *source: Tensor) -> tuple[Tensor, ...]:
        output, terms = _loss_and_terms(source, *arguments, keeps_terms=True)
        _save_loss(ctx, (source, *arguments), output, terms)
        ctx.number = in_step.number_of_call(ctx.specification.shard)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_backward_of_loss(ctx, upstream)[0]


def _rescaled(
    total: Gradient,
    factor: Tensor,  # ()
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """``factor * total`` in ``dtype``, in the memory of ``total`` unless the graph is kept."""
    if isinstance(total, HeadTerms):
        return total.finished(dtype, factor)
    if type(total) is not Tensor or is_recorded():
        return (total * factor).to(dtype)  # traced by a compiler, which places memory itself
    last = not _get_current_graph_task_keep_graph()
    out = total if last and total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    scaled: Tensor = row_kernels(backend, total.device, total.dtype).scale_into(total, factor, out)
    return scaled
