"""The sweep over the chunks of any source of logits, on one rank or many.

`loss_and_gradients` computes gradients in the forward: each chunk's logit gradients are used at once. `statistics` and
`gradients` are the two halves of recomputation, which computes logits again in the backward. All three take plain
tensors and record no graph; `chunked_ce.engine.statistics_operator` and `loss_operator` make them differentiable.

On many ranks each chunk takes one collective for the statistics of its rows, started before the next chunk's product
and waited for after it, and one for the gradient of its hidden states, which overlaps with the product for the head's
gradient. Chunks depend only on quantities that all ranks share, so that every rank issues the same collectives in the
same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.engine import invariant, plan_log
from chunked_ce.engine.call import Call
from chunked_ce.engine.device_filter import DeviceFilter, HeadTerms, filter_kernels
from chunked_ce.engine.exponential_products import ExponentialProducts, exponential_kernels
from chunked_ce.engine.filtered import Filter, GradientFilter, can_filter
from chunked_ce.engine.gradient_products import ChunkProducts, Gradient, LogitGradients, VocabularyProducts
from chunked_ce.engine.ranks import OneRank, ranks_of
from chunked_ce.engine.sources import Chunk, DepthsSource, HeadSource, LogitsSource, SequenceSource, Source
from chunked_ce.engine.totals import ForwardTotals
from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistics import (
    RowStatistics,
    merge_shards,
    passes_of,
    statistics_of,
    work_dtype,
    zero_statistics,
)

__all__ = ["LossAndGradients", "gradients", "loss_and_gradients", "statistics"]

LossAndGradients: TypeAlias = tuple[Tensor, list[Gradient | None], Tensor | None, RowStatistics]


def statistics(call: Call) -> RowStatistics:
    """The statistics of every row over the whole vocabulary, (N,) each and 0 for tokens that do not count.

    The products are those of `gradients`, block by block, so that the two round alike: a difference would be large
    compared with ``1 - p`` of a confident token. Only batch-invariant statistics have products of their own.
    """
    if call.specification.settings.invariant:
        return invariant.statistics(call)
    specification, device = call.specification, call.target.device
    names, dtype = specification.names, specification.settings.compute_dtype
    whole = zero_statistics(len(call.target), names, dtype, device, call.num_ids)
    first, second = passes_of(names)
    source = _source(call, sums_head=call.sums_head if second else None)
    if plan_log.LOGS_PLANS:
        plan_log.log_values(call, source)
    ranks, row_kernels = ranks_of(source), specification.row_kernels(device)

    def start(chunk: Chunk) -> Any:
        return ranks.combine(_part(source, chunk, row_kernels, overwrite=not second), first)

    def finish(chunk: Chunk, pending: Any) -> None:
        rows = _finished(source, chunk, row_kernels, ranks, pending.wait())
        source.tokens.put_statistics(whole, chunk.rows, rows)

    _pipeline(source.chunks(), start, finish, ranks)
    return source.in_order(whole)


def loss_and_gradients(call: Call) -> LossAndGradients:
    """The sum of the losses (), its gradients, the gradients of the targets' logits, and the statistics of every row.

    The gradients are in the order of the source's tensors, None where not needed, and have the dtypes of their sums.
    Where that of the weight is narrow, it lacks the targets' terms, which the backward adds from the gradients of the
    targets' logits, (N,) in fp32.
    """
    specification, objective = call.specification, not_none(call.specification.objective)
    source = _source(call).with_gradients()
    assert isinstance(source, HeadSource)
    if plan_log.LOGS_PLANS:
        plan_log.log_gradients(call, source, "forward")
    ranks, row_kernels = ranks_of(source), specification.row_kernels(call.target.device)
    totals = ForwardTotals(source, source.plan.head_sum)
    filter = _filter(source, objective.statistics)
    kernels = exponential_kernels(source)
    one_pass = None if kernels is None else ExponentialProducts(source, ranks, kernels)
    products = ChunkProducts(source, ranks, filter, keeps_unrounded=True) if one_pass is None else one_pass
    # On one rank a block is read once for statistics and gradients, unless the statistics first decide a scale.
    fused = specification.shard is None and not specification.scales_chunks

    def start(chunk: Chunk) -> Any:
        if fused:
            return None
        return ranks.combine(_part(source, chunk, row_kernels, overwrite=False), passes_of(specification.names)[0])

    def finish(chunk: Chunk, pending: Any) -> None:
        (block,) = chunk.blocks
        if one_pass is not None:
            slopes_of = functools.partial(totals.slopes, chunk.rows)
            totals.add(chunk.rows, one_pass.exponentiate_(chunk, block, slopes_of))
            one_pass.add(chunk, block, None, None, None)
            return
        arguments = block.products, block.column, block.class_weight, specification.logits
        columns, targets = products.column_sums(), products.targets_of(block)
        outputs: dict[str, Any] = {"columns": columns, "per_row": block.per_row}
        outputs |= {} if targets is None else {"apart": targets.gradient}
        slopes = scale = None
        if fused:
            slopes_of = functools.partial(totals.slopes, chunk.rows)
            asked = specification.names, slopes_of, objective.statistics
            rows = row_kernels.statistics_and_gradients_(*arguments, *asked, out=block.gradients, **outputs)
            if products.is_filtered:
                slopes = totals.slopes(chunk.rows, rows)
        else:
            rows = _finished(source, chunk, row_kernels, ranks, pending.wait())
            (x, *_) = chunk.xs
            if specification.scales_chunks and len(x):  # a chunk of a sequence shard may have no counted token
                slopes, scale = totals.scaled_slopes(chunk.rows, rows, largest=products.largest_gradient)
            else:
                slopes = totals.slopes(chunk.rows, rows)
            row_kernels.logit_gradients(*arguments, slopes, rows, out=block.gradients, **outputs)
        totals.add(chunk.rows, rows)
        products.set_scale(scale)
        later = totals.keep_targets(chunk.rows, targets)
        products.add(chunk, block, columns, targets, slopes, weight_later=later)

    _pipeline(source.chunks(), start, finish, ranks)
    return totals.loss, products.finish(), totals.targets, source.in_order(totals.statistics)


def gradients(
    call: Call,
    known: RowStatistics,  # (N,) each
    slopes: RowStatistics,  # (N,) each
    weight_sum: Tensor | None = None,  # (V, D)
) -> list[Tensor | None]:
    """The gradients of the source's tensors in their dtypes, from statistics and the slopes of the loss in them.

    The weight's gradient is added to ``weight_sum``, if given.
    """
    specification = call.specification
    filtered = can_filter(specification, slopes.named())
    source = _source(call, sums_head=specification.needs("weight") if filtered else None).with_gradients()
    if plan_log.LOGS_PLANS:
        plan_log.log_gradients(call, source, "backward")
    tokens, row_kernels = source.tokens, specification.row_kernels(call.target.device)
    scale = specification.logits.scale
    known = known.map(lambda values: tokens.select(source.in_chunk_order(values)))
    slopes = slopes.map(lambda values: tokens.mask(tokens.select(source.in_chunk_order(values))) * scale)
    if source.temperature is not None:
        slopes = slopes.scaled(1 / source.temperature)
    into = _destination(source, ranks_of(source), slopes, weight_sum)
    for chunk in source.chunks():
        for block in chunk.blocks:
            rows_slopes, columns, targets = slopes.at(block.rows), into.column_sums(), into.targets_of(block)
            outputs: dict[str, Any] = {} if targets is None else {"apart": targets.gradient}
            row_kernels.logit_gradients(
                block.products,
                block.column,
                block.class_weight,
                specification.logits,
                rows_slopes,
                known.at(block.rows),
                out=into.out(block),
                columns=columns,
                per_row=block.per_row,
                **outputs,
            )
            into.add(chunk, block, columns, targets, rows_slopes)
    named = zip(specification.parts, into.finish(), call.tensors, strict=True)
    factor = 1.0 if specification.shard is None else specification.shard.head_factor
    factors: dict[str, float] = {} if factor == 1 else dict.fromkeys(("weight", "bias", "adapter_weight"), factor)
    return [
        None if total is None else _rounded(total, tensor.dtype, factors.get(part)) for part, total, tensor in named
    ]


def _rounded(total: Gradient, dtype: torch.dtype, factor: float | None) -> Tensor:
    """A gradient in ``dtype`` from its sum, which ``factor`` multiplies before it is rounded."""
    if factor is None:
        return total.to(dtype)
    if isinstance(total, HeadTerms):
        return total.finished(dtype, torch.full((), factor, device=total.left.device))
    return total.mul_(factor).to(dtype)


def _source(call: Call, *, sums_head: bool | None = None) -> Source:
    """The source of a call, in chunks of tokens if it has an objective or ``sums_head`` is not None, and says whether
    the head's gradient is a sum over them; else in blocks of the vocabulary."""
    if not call.is_head:
        return LogitsSource(call)
    if call.is_sequence:
        return SequenceSource(call)
    source = HeadSource(call) if call.num_depths == 1 else DepthsSource(call)
    if call.cuts_tokens or (sums_head is None and call.specification.objective is not None):
        sums_head = call.sums_head
    if sums_head is not None:
        return source.cut(call.plan_by_tokens(len(source.tokens), sums_head=sums_head))
    return source.cut(call.plan_by_vocabulary(len(source.tokens)))


def _filter(source: HeadSource, slopes: Iterable[str]) -> GradientFilter[Any] | None:
    """The gradient filter of one loss, if it has one; it reads how many columns each chunk keeps."""
    call = source.call
    if not can_filter(call.specification, slopes):
        return None
    if devices.captures(source.hidden.device):
        raise ValueError("options.gradient_filter must be None for gradients in a CUDA graph: it makes the host wait")
    share = call.rows / max(1, call.vocab_size)
    eps = not_none(call.specification.settings.gradient_filter)
    arguments = source.head.weight, source.class_weight, eps, share
    kernels = filter_kernels(call.specification, source.hidden.device)
    if kernels is None:
        return Filter(*arguments)
    needs = call.specification.needs
    return DeviceFilter(
        *arguments,
        kernels=kernels,
        num_chunks=math.ceil(len(source.tokens) / source.plan.tokens),
        needs_hidden=needs("hidden"),
        head_sum=source.plan.head_sum if needs("weight") else None,
    )


def _destination(
    source: Source, ranks: OneRank, slopes: RowStatistics, weight_sum: Tensor | None
) -> LogitGradients | VocabularyProducts | ChunkProducts:
    """The products that recomputed gradients of logits enter."""
    if isinstance(source, LogitsSource):
        return LogitGradients(source)
    assert isinstance(source, HeadSource)
    if source.plan.entries is not None:
        return VocabularyProducts(source, ranks, weight_sum)
    filter, reduces_chunks = _filter(source, slopes.named()), source.call.cuts_tokens
    return ChunkProducts(source, ranks, filter, reduces_chunks=reduces_chunks, weight_sum=weight_sum)


def _part(source: Source, chunk: Chunk, row_kernels: ModuleType, *, overwrite: bool = True) -> Tensor:
    """This rank's part (C, columns) of a chunk's statistics, of the first pass, merged over its blocks in float64."""
    specification = source.call.specification
    names, _ = passes_of(specification.names)
    parts: dict[int, Tensor] = {}  # by their first row
    for block in chunk.blocks:
        part = row_kernels.shard_statistics(
            block.products,
            block.column,
            block.class_weight,
            specification.logits,
            names,
            block.start,
            overwrite=overwrite and source.owns_products,
            per_row=block.per_row,
        )
        before = parts.get(block.rows.start)
        if before is not None:
            part = merge_shards(torch.stack([before, part]).double(), names)
        parts[block.rows.start] = part
    whole = torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
    return whole.to(work_dtype(specification.settings.compute_dtype))


def _finished(source: Source, chunk: Chunk, row_kernels: ModuleType, ranks: OneRank, part: Tensor) -> RowStatistics:
    """The statistics of a chunk, from the part (C, columns) of its first pass over the whole vocabulary."""
    specification = source.call.specification
    first, second = passes_of(specification.names)
    rows = statistics_of(part, source.tokens.target[chunk.rows], first)
    if not second:
        return rows
    parts = []
    for block in chunk.blocks:  # of tokens: each has all entries of this rank
        within = slice(block.rows.start - chunk.rows.start, block.rows.stop - chunk.rows.start)
        arguments = block.products, specification.logits, second, rows.at(within)
        parts.append(row_kernels.second_statistics(*arguments, per_row=block.per_row))
    values = ranks.combine(torch.cat(parts), second).wait()
    return rows._replace(**dict(zip(second, values.unbind(-1), strict=True)))


def _pipeline(
    chunks: Iterable[Chunk], start: Callable[[Chunk], Any], finish: Callable[[Chunk, Any], None], ranks: OneRank
) -> None:
    """``start`` and ``finish`` each chunk; on many ranks, ``finish`` it once the next one has started."""
    previous = None
    for chunk in chunks:
        begun = chunk, start(chunk)
        if ranks.in_flight == 1:
            finish(*begun)
            continue
        if previous is not None:
            finish(*previous)
        previous = begun
    if previous is not None:
        finish(*previous)
