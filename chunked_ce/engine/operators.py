"""The sweep as operators for autograd and ``torch.compile``, for every source of logits.

An operator takes the tensors of the source, the tensors per token, and one encoded specification. Where nothing records
operations, the same functions are called without the dispatcher, which takes as long as a small loss. Second
derivatives go through `chunked_ce.engine.plain`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chunked_ce.devices import unrounded
from chunked_ce.engine import in_step, plain, sweep
from chunked_ce.engine.accumulation import destination, leaf_to_keep
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import columns_of
from chunked_ce.engine.device_filter import HeadTerms
from chunked_ce.engine.device_memory import with_smaller_chunks
from chunked_ce.engine.filtered import can_filter
from chunked_ce.engine.gradient_products import TargetGradients
from chunked_ce.engine.head_gradients import HIDDEN_PARTS
from chunked_ce.engine.released_parameters import check_head_still_there
from chunked_ce.engine.specification import decoded, encoded
from chunked_ce.engine.totals import keeps_targets
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.rows.backend import row_kernels
from chunked_ce.rows.statistics import STATISTICS, RowStatistics, work_dtype, zero_statistics
from chunked_ce.tracing import is_batched, is_recorded, no_autocast, runs_at_once

__all__ = ["loss", "statistics"]


def statistics(call: Call) -> RowStatistics:
    """`chunked_ce.engine.sweep.statistics`, differentiable by recomputation."""
    arguments = list(call.extra), *_rest(call)
    if runs_at_once(*call.tensors):
        if torch.is_grad_enabled():
            outputs = _Statistics.apply(arguments, *call.tensors)
        else:
            outputs = _run_statistics(call.tensors, *arguments)
    else:
        outputs = _statistics(list(call.tensors), *arguments)
    return RowStatistics(**dict(zip(call.specification.names, outputs, strict=True)))


def loss(call: Call) -> tuple[Tensor, RowStatistics]:
    """`chunked_ce.engine.sweep.loss_and_gradients`, differentiable; the statistics are not."""
    arguments = list(call.extra), *_rest(call)
    if runs_at_once(*call.tensors):
        outputs = _Loss.apply(arguments, *call.tensors)
    else:
        outputs = _loss(list(call.tensors), *arguments)
    names = call.specification.names
    return outputs[0], RowStatistics(**dict(zip(names, outputs[-len(names) :], strict=True)))


def _rest(call: Call) -> tuple[Tensor | None, Tensor, int, str]:
    return call.class_weight, call.target, call.ignore_index, encoded(call.specification)


def _call(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> Call:
    return Call(source, class_weight, target, ignore_index, decoded(specification), extra)


# ---- recomputation: statistics in the forward, gradients from logits computed again in the backward ----


def _run_statistics(
    source: Sequence[Tensor],
    extra: Sequence[Tensor],
    class_weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    specification: str,
) -> list[Tensor]:
    call = _call(source, extra, class_weight, target, ignore_index, specification)
    with no_autocast(target.device):
        if call.specification.shard is not None:
            rows = in_step.statistics(call)
        elif call.is_head:

            def plan():
                return call.plan_of_recomputation(len(target), filtered=False)

            rows = with_smaller_chunks(sweep.statistics, call, plan)
        else:
            rows = sweep.statistics(call)
    return list(rows.named().values())


_statistics = torch.library.custom_op("chunked_ce::statistics", _run_statistics, mutates_args=())


@_statistics.register_fake
def _(*arguments):
    return _fake_statistics(_call(*arguments))


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
    call = _call(source, extra, class_weight, target, ignore_index, specification)
    return _filled(_recomputed(call, statistics, slopes), source)


def _recomputed(
    call: Call,
    statistics: Sequence[Tensor],
    slopes: Sequence[Tensor],
    weight_sum: Tensor | None = None,
    number: int = 0,
) -> Sequence[Tensor | None]:
    specification = call.specification
    given = RowStatistics(None, None, None)._replace(**dict(zip(specification.slopes, slopes, strict=True)))
    known = RowStatistics(**dict(zip(_in_gradient(specification.names), statistics, strict=True)))

    def plan():
        filtered = can_filter(specification, specification.slopes)
        return call.plan_of_recomputation(len(call.target), filtered=filtered)

    with no_autocast(call.target.device):
        if specification.shard is not None:
            return in_step.gradients(call, known, given, weight_sum, number)
        if call.is_head and weight_sum is None:
            return with_smaller_chunks(lambda again: sweep.gradients(again, known, given), call, plan)
        return sweep.gradients(call, known, given, weight_sum)


@_gradients.register_fake
def _(source, statistics, slopes, extra, class_weight, target, ignore_index, specification):
    needed = decoded(specification).needed
    grads = [tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(source, needed, strict=True)]
    return _filled(grads, source)


def _save_statistics(ctx, inputs, output):
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
    ctx.save_for_backward(*source, *_saved_extra(ctx, extra), class_weight, target, *kept)
    ctx.mark_non_differentiable(*(part for name, part in rows.items() if not STATISTICS[name].differentiable))
    ctx.set_materialize_grads(False)


def _backward_of_statistics(ctx, upstream):
    saved = iter(ctx.saved_tensors)  # may be read only once
    source, extra = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    extra = _restored_extra(ctx, extra)
    class_weight, target, *known = saved
    specification = ctx.specification
    upstream = dict(zip(specification.names, upstream, strict=True))
    needed, weight_sum = _needed(ctx), None
    if ctx.head_shapes is not None:
        check_head_still_there(specification.parts, source, ctx.head_shapes, is_read=True)
        into, at = specification.settings.accumulate_into, specification.parts.index("weight")
        needed[at], weight_sum = destination(ctx.leaf, source[at], into, needed[at])
    names = tuple(name for name, grad in upstream.items() if grad is not None or name in ("log_sum", "target"))
    names = tuple(name for name in names if STATISTICS[name].differentiable)
    specification = specification._replace(needed=tuple(needed), slopes=names)
    call = Call(source, class_weight, target, ctx.ignore_index, specification, extra)
    given = {name: upstream[name] for name in names if upstream[name] is not None}
    if torch.is_grad_enabled() or is_batched(*given.values()):

        def outputs() -> list[Tensor]:
            rows = plain.statistics(call).named()
            return [rows[name] for name in given]

        grads = _plain_gradients(outputs, list(given.values()), call, needed)
    else:
        slopes = [given[name] if name in given else torch.zeros_like(known[0]) for name in names]  # log_sum, target
        if weight_sum is not None or runs_at_once(*source):
            # With a sum, called directly: it mutates the weight's gradient, which is not an operator argument.
            grads = _recomputed(call, known, slopes, weight_sum, ctx.number)
        else:
            grads = _gradients(list(source), known, slopes, list(extra), *_rest(call))
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return grads, [None] * len(extra), None, None, None, None


_statistics.register_autograd(_backward_of_statistics, setup_context=_save_statistics)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, *source):
        output = _run_statistics(source, *arguments)
        _save_statistics(ctx, (source, *arguments), output)
        ctx.number = in_step.number_of_call(ctx.specification.shard)
        return tuple(output)

    @staticmethod
    def backward(ctx, *upstream):
        return None, *_backward_of_statistics(ctx, upstream)[0]


# ---- gradients computed in the forward, rescaled in the backward ----


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
    call = _call(source, extra, class_weight, target, ignore_index, specification)
    with no_autocast(target.device):
        if call.specification.shard is None:

            def plan():
                return call.plan_by_tokens(len(target), sums_head=call.sums_head)

            outputs = with_smaller_chunks(sweep.loss_and_gradients, call, plan)
        else:
            outputs = in_step.loss_and_gradients(call)
    loss, grads, targets, rows = outputs
    terms, at = None, call.specification.parts.index("weight")
    if keeps_terms and isinstance(grads[at], HeadTerms):
        terms, grads[at] = grads[at], None
    if grads[at] is not None:  # smaller chunks may have another sum dtype than planned
        grads[at] = grads[at].to(_head_sum_dtype(call))
    targets = loss.new_empty(0, dtype=torch.float32) if targets is None else targets
    return [loss, *_filled(grads, source), targets, *rows.named().values()], terms


_loss = torch.library.custom_op("chunked_ce::loss", _run_loss, mutates_args=())


@_loss.register_fake
def _(source, extra, class_weight, target, ignore_index, specification):
    call = _call(source, extra, class_weight, target, ignore_index, specification)
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
    rows = _fake_statistics(call)
    return [rows[0].new_empty(()), *_filled(grads, source), targets, *rows]


def _head_sum_dtype(call: Call) -> torch.dtype:
    settings = call.specification.settings
    if settings.head_sum_dtype is not None:  # sizes may be symbols, which a plan cannot compare
        return settings.head_sum_dtype
    return call.plan_by_tokens(len(call.target), sums_head=call.sums_head).head_sum


def _save_loss(ctx, inputs, output, terms: HeadTerms | None = None):
    source, extra, class_weight, target, ctx.ignore_index, text = inputs
    ctx.specification = decoded(text)
    ctx.sizes, ctx.number = (len(source), len(extra)), 0
    ctx.head_shapes = [tensor.shape for tensor in source]
    _, *grads = output[: len(source) + 2]  # and those of the targets' logits
    ctx.filter_kernels, *terms = (None,) if terms is None else terms
    ctx.save_for_backward(*source, *_saved_extra(ctx, extra), class_weight, target, *grads, *terms)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_loss(ctx, upstream):
    num_tensors, num_extra = ctx.sizes
    grad, none = upstream[0], ([None] * num_extra, None, None, None, None)
    if grad is None:
        return [None] * num_tensors, *none
    saved = iter(ctx.saved_tensors)
    source, extra = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    extra = _restored_extra(ctx, extra)
    class_weight, target, *totals = saved
    totals, (targets, *of_head) = totals[:num_tensors], totals[num_tensors:]
    specification, needed = ctx.specification, _needed(ctx)
    read = [tensor if need else None for tensor, need in zip(source, needed, strict=True)]
    check_head_still_there(specification.parts, read, ctx.head_shapes, is_read=False)
    call = Call(source, class_weight, target, ctx.ignore_index, specification, extra)
    if torch.is_grad_enabled() or is_batched(grad):
        return _plain_gradients(lambda: [plain.loss(call)], [grad], call, needed), *none
    known = not any(need and not had for need, had in zip(needed, specification.needed, strict=True))
    is_own = specification.shard is not None and specification.shard.is_own
    rows, at = None, specification.parts.index("weight")
    if of_head and needed[at]:
        totals[at] = HeadTerms(ctx.filter_kernels, *of_head)
    if is_own and runs_at_once(*source):
        return _of_own_tokens(call, totals, grad, needed, ctx.number, known=known), *none
    if not known:
        return _unprepared_gradients(call, grad, needed), *none
    if is_own:
        call = call._replace(specification=specification._replace(needed=tuple(needed)))
        return _own_gradients(list(source), totals, grad, list(extra), *_rest(call)), *none
    if needed[at] and targets.numel() > 0 and not of_head:
        column = columns_of(target, call.start, call.rows, targets != 0)
        terms = TargetGradients(column, targets)
        (hidden,) = call.named("hidden")
        entries, rows = terms.summed_rows(totals[at], hidden, specification.settings.compute_dtype)
    backend = specification.settings.backend
    grads = [
        _rescaled(total, grad, tensor.dtype, backend) if need else None
        for total, tensor, need in zip(totals, source, needed, strict=True)
    ]
    if rows is not None:
        grads[at].index_copy_(0, entries, (rows * grad).to(grads[at].dtype))
    return grads, *none


def _of_own_tokens(
    call: Call,
    totals: list[Tensor | HeadTerms],
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
    backend, shard = call.specification.settings.backend, call.specification.shard
    of_head, grads = grad / Collectives(shard.group_name).size, []
    for part, total, tensor, need in zip(call.specification.parts, totals, call.tensors, needed, strict=True):
        factor = grad if part in HIDDEN_PARTS else of_head
        grads.append(_rescaled(total, factor, tensor.dtype, backend) if need else None)
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
    call = _call(source, extra, class_weight, target, ignore_index, specification)
    copies = [total.clone() for total in totals]  # an operator returns no memory of its arguments
    return _filled(_of_own_tokens(call, copies, grad, call.specification.needed), source)


@_own_gradients.register_fake
def _(source, totals, grad, extra, class_weight, target, ignore_index, specification):
    needed = decoded(specification).needed
    grads = [tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(source, needed, strict=True)]
    return _filled(grads, source)


def _unprepared_gradients(call: Call, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients by recomputation: an exported graph runs with tensors that need other gradients than when traced."""
    objective, dtype = call.specification.objective, call.specification.settings.compute_dtype
    with torch.enable_grad():
        source = [x.detach().requires_grad_(need) for x, need in zip(call.tensors, needed, strict=True)]
        rows = statistics(call.for_statistics()._replace(tensors=source)).map(Tensor.double)
        arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size, call.per_token
        loss = objective.losses(rows, *arguments).sum().to(work_dtype(dtype))
    return _gradients_of([(loss, grad)], source, needed)


_loss.register_autograd(_backward_of_loss, setup_context=_save_loss)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, *source):
        output, terms = _loss_and_terms(source, *arguments, keeps_terms=True)
        _save_loss(ctx, (source, *arguments), output, terms)
        ctx.number = in_step.number_of_call(ctx.specification.shard)
        return tuple(output)

    @staticmethod
    def backward(ctx, *upstream):
        return None, *_backward_of_loss(ctx, upstream)[0]


def _rescaled(
    total: Tensor | HeadTerms,
    factor: Tensor,  # ()
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """``factor * total`` in ``dtype``, in the memory of ``total`` unless the graph is kept."""
    if isinstance(total, HeadTerms):
        return total.finished(dtype, factor)
    if type(total) is not Tensor or is_recorded():
        return (total * factor).to(dtype)  # traced by a compiler, which places memory itself
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    out = total if last and total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    return row_kernels(backend, total.device, total.dtype).scale_into(total, factor, out)


# ---- shared ----


def _saved_extra(ctx, extra: Sequence[Tensor]) -> list[Tensor | None]:
    """Constant tensors for ``save_for_backward``, which refuses those of inference mode: the context keeps them."""
    ctx.of_inference = {at: tensor for at, tensor in enumerate(extra) if tensor.is_inference()}
    return [None if at in ctx.of_inference else tensor for at, tensor in enumerate(extra)]


def _restored_extra(ctx, extra: Sequence[Tensor | None]) -> list[Tensor]:
    return [ctx.of_inference.get(at, tensor) for at, tensor in enumerate(extra)]


def _needed(ctx) -> list[bool]:
    """Which tensors of the source need a gradient: an operator takes them as its first argument, a list; a function
    takes them as its last ones."""
    first, *rest = ctx.needs_input_grad
    return list(first) if isinstance(first, list | tuple) else rest


def _in_gradient(names: Sequence[str]) -> list[str]:
    """The statistics that the gradients of the logits need."""
    return [name for name in names if STATISTICS[name].in_gradient]


def _fake_statistics(call: Call) -> list[Tensor]:
    specification, target = call.specification, call.target
    dtype = specification.settings.compute_dtype
    rows = zero_statistics(target.shape[0], specification.names, dtype, target.device, call.num_ids)
    return list(rows.named().values())


def _filled(grads: Sequence[Tensor | None], source: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a source, empty where not needed, since an operator returns only tensors."""
    pairs = zip(grads, source, strict=True)
    return [tensor.new_empty(0) if grad is None else grad for grad, tensor in pairs]


def _plain_gradients(
    outputs: Callable[[], list[Tensor]], upstream: Sequence[Tensor], call: Call, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients through the plain graph of ``outputs``, differentiable if a graph of the backward is wanted."""
    if call.specification.shard is not None:
        raise NotImplementedError("vocab: no derivatives of derivatives (create_graph=True) with a sharded vocabulary")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        pairs = list(zip(outputs(), upstream, strict=True))
    return _gradients_of(pairs, call.tensors, needed, create_graph=create_graph, materialize_grads=True)


def _gradients_of(
    pairs: Sequence[tuple[Tensor, Tensor]], source: Sequence[Tensor], needed: Sequence[bool], **keywords: bool
) -> list[Tensor | None]:
    outputs, upstream = zip(*pairs, strict=True)
    leaves = [tensor for tensor, need in zip(source, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(outputs, leaves, upstream, **keywords))
    return [next(gradients) if need else None for need in needed]
