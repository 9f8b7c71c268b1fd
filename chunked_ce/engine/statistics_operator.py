"""`chunked_ce.engine.sweep.statistics` as an operator for autograd and ``torch.compile``, for every source of logits.

Its backward is `chunked_ce.engine.sweep.gradients`: logits are computed again. An operator takes the tensors of the
source, the tensors per token, and one encoded specification. Where nothing records operations, the same functions are
called without the dispatcher, which takes as long as a small loss. Second derivatives go through
`chunked_ce.engine.plain`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce.engine import in_step, plain, sweep
from chunked_ce.engine.accumulation import destination, leaf_to_keep
from chunked_ce.engine.call import Call
from chunked_ce.engine.device_memory import with_smaller_chunks
from chunked_ce.engine.filtered import can_filter
from chunked_ce.engine.operator_arguments import (
    call_from,
    fake_statistics,
    filled,
    needed_of,
    plain_gradients,
    rest_of,
    restored_extra,
    saved_extra,
)
from chunked_ce.engine.released_parameters import check_head_still_there
from chunked_ce.engine.specification import decoded
from chunked_ce.plan import Plan
from chunked_ce.rows.statistics import STATISTICS, RowStatistics
from chunked_ce.tracing import is_batched, no_autocast, runs_at_once

__all__ = ["statistics"]


def statistics(call: Call) -> RowStatistics:
    """`chunked_ce.engine.sweep.statistics`, differentiable by recomputation."""
    arguments = list(call.extra), *rest_of(call)
    if runs_at_once(*call.tensors):
        if torch.is_grad_enabled():
            outputs: Sequence[Tensor] = _Statistics.apply(arguments, *call.tensors)  # type: ignore[no-untyped-call]
        else:
            outputs = _run_statistics(call.tensors, *arguments)
    else:
        outputs = _statistics(list(call.tensors), *arguments)
    return RowStatistics(**dict(zip(call.specification.names, outputs, strict=True)))


def _run_statistics(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = call_from(source, extra, class_weight, target, ignore_index, specification)
    with no_autocast(target.device):
        if call.specification.shard is not None:
            rows = in_step.statistics(call)
        elif call.is_head:

            def plan() -> Plan:
                return call.plan_of_recomputation(len(target), filtered=False)

            rows = with_smaller_chunks(sweep.statistics, call, plan)
        else:
            rows = sweep.statistics(call)
    return list(rows.named().values())


_statistics = torch.library.custom_op("chunked_ce::statistics", _run_statistics, mutates_args=())


@_statistics.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return fake_statistics(call_from(*arguments))


@torch.library.custom_op("chunked_ce::gradients", mutates_args=())
def _gradients(
    source: Sequence[Tensor],
    statistics: Sequence[Tensor],
    slopes: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = call_from(source, extra, class_weight, target, ignore_index, specification)
    return filled(_recomputed(call, statistics, slopes), source)


def _recomputed(
    call: Call,
    statistics: Sequence[Tensor],
    slopes: Sequence[Tensor],
    weight_sum: Tensor | None = None,
    number: int = 0,
) -> Sequence[Tensor | None]:
    specification = call.specification
    named: dict[str, Any] = {"maximum": None}
    named |= zip(specification.slopes, slopes, strict=True)  # log_sum and target among them
    given = RowStatistics(**named)
    known = RowStatistics(**dict(zip(_in_gradient(specification.names), statistics, strict=True)))

    def plan() -> Plan:
        filtered = can_filter(specification, specification.slopes)
        return call.plan_of_recomputation(len(call.target), filtered=filtered)

    with no_autocast(call.target.device):
        if specification.shard is not None:
            return in_step.gradients(call, known, given, weight_sum, number)
        if call.is_head and weight_sum is None:
            return with_smaller_chunks(lambda again: sweep.gradients(again, known, given), call, plan)
        return sweep.gradients(call, known, given, weight_sum)


@_gradients.register_fake
def _(
    source: Sequence[Tensor],
    statistics: Sequence[Tensor],
    slopes: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    needed = decoded(specification).needed
    grads = [tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(source, needed, strict=True)]
    return filled(grads, source)


def _save_statistics(ctx: Any, inputs: Any, output: Sequence[Tensor]) -> None:
    source, extra, class_weight, target, ctx.ignore_index, text = inputs
    ctx.specification = specification = decoded(text)
    ctx.sizes, ctx.number = (len(source), len(extra)), 0
    ctx.leaf = ctx.head_shapes = None
    if specification.source == "head":
        weight = source[specification.parts.index("weight")]
        ctx.leaf = leaf_to_keep(weight, specification.settings.accumulate_into)
        ctx.head_shapes = [tensor.shape for tensor in source]
    rows = dict(zip(specification.names, output, strict=True))
    kept = [rows[name] for name in _in_gradient(specification.names)]
    ctx.save_for_backward(*source, *saved_extra(ctx, extra), class_weight, target, *kept)
    ctx.mark_non_differentiable(*(part for name, part in rows.items() if not STATISTICS[name].differentiable))
    ctx.set_materialize_grads(False)


def _backward_of_statistics(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)  # may be read only once
    source, extra = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    extra = restored_extra(ctx, extra)
    class_weight, target, *known = saved
    specification = ctx.specification
    slope_of = dict(zip(specification.names, upstream, strict=True))
    needed, weight_sum = needed_of(ctx), None
    if ctx.head_shapes is not None:
        check_head_still_there(specification.parts, source, ctx.head_shapes, is_read=True)
        into, at = specification.settings.accumulate_into, specification.parts.index("weight")
        needed[at], weight_sum = destination(ctx.leaf, source[at], into, needed[at])
    names = tuple(name for name, grad in slope_of.items() if grad is not None or name in ("log_sum", "target"))
    names = tuple(name for name in names if STATISTICS[name].differentiable)
    specification = specification._replace(needed=tuple(needed), slopes=names)
    call = Call(source, class_weight, target, ctx.ignore_index, specification, extra)
    given: dict[str, Tensor] = {}
    for name in names:  # a comprehension that binds a name is more than compiled autograd reads
        slope = slope_of[name]
        if slope is not None:
            given[name] = slope
    if torch.is_grad_enabled() or is_batched(*given.values()):

        def outputs() -> list[Tensor]:
            rows = plain.statistics(call).named()
            return [rows[name] for name in given]

        grads: Sequence[Tensor | None] = plain_gradients(outputs, list(given.values()), call, needed)
    else:
        slopes = [given[name] if name in given else torch.zeros_like(known[0]) for name in names]  # log_sum, target
        if weight_sum is not None or runs_at_once(*source):
            # With a sum, called directly: it mutates the weight's gradient, which is not an operator argument.
            grads = _recomputed(call, known, slopes, weight_sum, ctx.number)
        else:
            grads = _gradients(list(source), known, slopes, list(extra), *rest_of(call))
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return grads, [None] * len(extra), None, None, None, None


_statistics.register_autograd(_backward_of_statistics, setup_context=_save_statistics)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *source: Tensor) -> tuple[Tensor, ...]:
        output = _run_statistics(source, *arguments)
        _save_statistics(ctx, (source, *arguments), output)
        ctx.number = in_step.number_of_call(ctx.specification.shard)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_backward_of_statistics(ctx, upstream)[0]


def _in_gradient(names: Sequence[str]) -> list[str]:
    """The statistics that the gradients of the logits need."""
    return [name for name in names if STATISTICS[name].in_gradient]
