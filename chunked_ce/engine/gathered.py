"""Logits at a few ids per token: products of hidden states with the rows of the head that the ids name.

M ids of N tokens take N M D operations instead of N V D, and the logits (N, V) never exist. The rows are gathered for a
few tokens at a time. On many ranks each one forms the products of the ids that it holds, and the sum over the ranks is
that of one number and zeros.

`logits` and `gradients` take plain tensors and record no graph; `chunked_ce.engine.gathered_operator` makes them
differentiable. `plain_logits` is their slow twin, which gathers all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import check_range, columns_of
from chunked_ce.engine.head_gradients import HIDDEN_PARTS, WEIGHT_PARTS, HeadGradients
from chunked_ce.engine.ranks import ranks_of
from chunked_ce.engine.sources import HeadSource, SequenceSource
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.rows.statistics import work_dtype

__all__ = ["GATHERED", "gradients", "ids_of", "logits", "plain_logits"]

GATHERED = "chunked_ce: the sum of logits at ids"
_CACHED_ELEMENTS = 2**18  # of gathered rows at a time, in fp32: they stay in a second-level cache
_DEVICE_ELEMENTS = 2**24  # on an accelerator a kernel must be worth its launch


def ids_of(call: Call) -> Tensor:
    """The ids (N, M) at which a call wants logits: those of all its tensors per token, -1 for an id that is none."""
    ids = torch.cat(list(call.per_token.values()), -1)
    return ids.where(ids != call.ignore_index, -1)


def logits(call: Call) -> Tensor:
    """The products plus bias at the ids, (N, M) in the work dtype: 0 where an id is none and for ignored tokens."""
    source, columns = _source(call)
    dtype = _dtype(call)
    found = source.hidden.new_zeros(columns.shape, dtype=dtype)  # (n, M)
    bias = None if source.bias is None else source.bias.to(source.logits_dtype).to(dtype)
    for chunk in source.parts():
        first = chunk.rows.start
        for x, head in zip(chunk.xs, source.weights, strict=True):
            for part, weight in _gathered(source, head, columns[chunk.rows], x):
                place = slice(first + part.start, first + part.stop)
                found[place] += weight.mul_(x[part].to(dtype).unsqueeze(1)).sum(-1)
    if bias is not None and len(bias) > 0:
        found += bias[columns.clamp(min=0)]
    found = found.where(columns >= 0, 0)
    whole = found.new_zeros(call.num_tokens, columns.shape[1])
    source.tokens.put(whole, slice(None), found)
    whole = source.from_chunk_order(whole)
    shard = call.specification.shard
    return whole if shard is None else Collectives(shard.group_name).all_reduce_(whole, GATHERED).wait()


def gradients(
    call: Call,
    upstream: Tensor,  # (N, M)
) -> list[Tensor | None]:
    """The gradients of the source's tensors in their dtypes; None if not needed."""
    source, columns = _source(call)
    ranks, dtype = ranks_of(source), _dtype(call)
    upstream = source.tokens.select(source.in_chunk_order(upstream)).where(columns >= 0, 0)  # (n, M)
    num_rows = len(source.weight)
    reduced = call.specification.shard is not None and call.specification.shard.input_grad != "partial"

    def dtype_of(part: str, tensor: Tensor) -> torch.dtype:
        return call.reduce_dtype() if reduced and part in HIDDEN_PARTS else dtype

    total = HeadGradients.empty(call, dtype_of, written=(), skipped=(*WEIGHT_PARTS, "bias"))
    needs_weight = [call.specification.needs(part) for part in WEIGHT_PARTS]
    for chunk in source.parts():
        rows = chunk.rows
        of_hidden: list[Tensor] = []
        for pair, x, head, needs in zip(total.pairs, chunk.xs, source.weights, needs_weight, strict=False):
            if pair.hidden is not None:
                part = x.new_zeros(x.shape, dtype=dtype)
                for few, weight in _gathered(source, head, columns[rows], x):
                    part[few] = torch.bmm(upstream[rows][few].unsqueeze(1), weight).squeeze(1)
                of_hidden.append(part)
            if needs:
                part = _weight_gradient(upstream[rows], columns[rows], x.to(dtype), num_rows)
                pair.weight = part if pair.weight is None else pair.weight.add_(part)
        totals = [pair.hidden for pair in total.pairs if pair.hidden is not None]
        if call.is_sequence and of_hidden:
            of_hidden = [*ranks.reduce(chunk, of_hidden).wait()]
        for hidden, part in zip(totals, of_hidden, strict=True):
            ranks.put(hidden, chunk, part)
    for pair, head, needs in zip(total.pairs, source.weights, needs_weight, strict=False):
        if pair.hidden is not None and not call.is_sequence:
            pair.hidden = ranks.reduce_whole(pair.hidden)
        if needs and pair.weight is None:
            pair.weight = torch.zeros_like(head)
    if call.specification.needs("bias"):
        places = columns.where(columns >= 0, num_rows).flatten()
        total.bias = upstream.new_zeros(num_rows + 1).index_add_(0, places, upstream.flatten())[:-1]
    found = zip(total.in_order(), call.tensors, strict=True)
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in found]


def plain_logits(call: Call) -> Tensor:
    """`logits` in plain differentiable torch, on one rank."""
    dtype, counted, ids = _dtype(call), (call.target != call.ignore_index).unsqueeze(-1), ids_of(call)
    settings = call.specification.settings
    named = {
        part: tensor.to(settings.logits_dtype if part == "bias" else settings.compute_dtype).to(dtype)
        for part, tensor in zip(call.specification.parts, call.tensors, strict=True)
    }
    places = ids.clamp(min=0)
    products: Any = named["bias"][places] if "bias" in named else 0.0
    for hidden, weight in zip(HIDDEN_PARTS, WEIGHT_PARTS, strict=True):
        if weight in named:
            products = products + (named[weight][places] * named[hidden].where(counted, 0).unsqueeze(1)).sum(-1)
    whole: Tensor = products.where((ids >= 0) & counted, 0)
    return whole


def _dtype(call: Call) -> torch.dtype:
    return work_dtype(call.specification.settings.compute_dtype)


def _source(call: Call) -> tuple[HeadSource, Tensor]:
    """The tokens that count, and the columns (n, M) of their ids in this rank's rows, -1 for an id that is in none."""
    source: HeadSource
    if call.is_sequence:
        source = SequenceSource(call)
    else:
        source = HeadSource(call)
        source.cut(call.plan_by_vocabulary(len(source.tokens)))  # all tokens in one part
    for name, ids in call.per_token.items():
        check_range(name, ids, call.ignore_index, call.vocab_size)
    ids = source.tokens.select(source.in_chunk_order(ids_of(call)))
    return source, columns_of(ids, call.start, call.rows)


def _gathered(
    source: HeadSource,
    head: Tensor,  # (V, D) one of its weights
    columns: Tensor,  # (C, M)
    x: Tensor,  # (C, D)
) -> Iterator[tuple[slice, Tensor]]:
    """A few tokens at a time, and the rows (c, M, D) of the head that their columns name, any row where there is none;
    in the work dtype, in memory that may be overwritten."""
    size = columns.shape[1] * x.shape[1]
    if len(head) == 0:
        return
    elements = _CACHED_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // max(1, size))
    for start in range(0, len(columns), step):
        part = slice(start, min(start + step, len(columns)))
        places = columns[part].clamp(min=0)
        weight = head.index_select(0, places.flatten()).to(source.dtype).to(work_dtype(source.dtype))
        yield part, weight.view(*places.shape, x.shape[1])


def _weight_gradient(
    upstream: Tensor,  # (C, M) 0 where the column is -1
    columns: Tensor,  # (C, M)
    x: Tensor,  # (C, D) in the work dtype
    num_rows: int,
) -> Tensor:
    """The gradient (V, D) of the head: each row sums the hidden states that met it, times ``upstream``."""
    if columns.numel() == 0:
        return x.new_zeros(num_rows, x.shape[1])
    ordered, order = columns.where(columns >= 0, num_rows).flatten().sort(dim=0, stable=True)
    first = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=ordered.device))  # of each row's tokens
    tokens = order // columns.shape[1]
    factors = upstream.flatten()[order]
    return F.embedding_bag(tokens, x, first, mode="sum", per_sample_weights=factors)[:-1]
