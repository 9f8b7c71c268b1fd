"""The chunk loops: a head's product, the row kernels and the gradients' products, one chunk after another.

`loss_and_gradients` is the forward way: each chunk's logit gradients are used at once. `statistics` and `gradients`
are the two halves of the backward way, in which logits are formed again, one block of the vocabulary at a time.
Everything here takes plain tensors and computes no graph; `chunked_ce.engine.ops` gives it to autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.engine import rows as row_kernels
from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.products import add_product_, project
from chunked_ce.engine.rows import Slopes, Wanted, work_dtype
from chunked_ce.objective import Logits, Objective, RowStatistics

__all__ = ["Gradients", "Head", "Settings", "gradients", "loss_and_gradients", "statistics"]


class Head(NamedTuple):
    """The output projection and what follows it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logits: Logits
    class_weight: Tensor | None  # (V,) in the work dtype

    def to(self, dtype: torch.dtype) -> Head:
        return self._replace(
            weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype)
        )


class Settings(NamedTuple):
    """How to compute, as `ChunkOptions` and the autocast state say; None lets the plan choose."""

    compute_dtype: torch.dtype
    accumulate_dtype: torch.dtype
    chunk_size: int | None
    memory_budget: int | None


class Gradients(NamedTuple):
    """Gradients in the shapes of their tensors, None where nobody needs one."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


def statistics(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    ignore_index: int,
    wanted: Wanted,
    settings: Settings,
) -> RowStatistics:
    """The statistics of every token's row, (N,) each and 0 for tokens that do not count."""
    tokens = CountedTokens(target, ignore_index, len(head.weight))
    found = row_kernels.empty_statistics(len(target), settings.compute_dtype, hidden.device, wanted)
    chunk = plan.tokens_per_chunk(len(tokens), *head.weight.shape, **settings._asdict())
    head = head.to(settings.compute_dtype)
    for rows, _, products in _chunks(hidden, head, tokens, chunk):
        part = row_kernels.statistics(
            products, tokens.target[rows], head.class_weight, head.logits, wanted, overwrite=True
        )
        tokens.put_statistics(found, rows, part)
    return found


def loss_and_gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    token_weight: Tensor | None,  # (N,)
    upstream: Tensor,  # () the gradient expected for the loss
    objective: Objective,
    ignore_index: int,
    wanted: Wanted,
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: Settings,
) -> tuple[Tensor, Gradients, RowStatistics]:
    """The sum of the losses (), its gradients times ``upstream``, and the statistics of every row.

    The head's gradients come in the dtype of their sum over the chunks.
    """
    tokens = CountedTokens(target, ignore_index, len(head.weight))
    found = row_kernels.empty_statistics(len(target), settings.compute_dtype, hidden.device, wanted)
    head_dtype = head.weight.dtype if needed[1] else None
    total_dtype = plan.head_sum_dtype(len(target), *head.weight.shape, head_dtype=head.weight.dtype, **settings._asdict())
    chunk = plan.tokens_per_chunk(
        len(tokens), *head.weight.shape, head_dtype=head_dtype, **settings._asdict()
    )
    total = _new_gradients(hidden, head, needed, total_dtype, zero=len(tokens) == 0, keep=tokens.all_kept)

    dtype = work_dtype(settings.compute_dtype)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    weights = torch.ones_like(tokens.target, dtype=dtype)
    weights = tokens.mask(weights if token_weight is None else tokens.select(token_weight).to(dtype))  # (n,)
    factor = weights * upstream * head.logits.scale
    class_weight = head.class_weight
    target_weight = None if class_weight is None else class_weight[tokens.target]
    weight_sum = float(len(head.weight)) if class_weight is None else class_weight.sum()

    head = head.to(settings.compute_dtype)
    for rows, x, products in _chunks(hidden, head, tokens, chunk):
        chunk_factor = factor[rows]
        chunk_weight = None if target_weight is None else target_weight[rows]

        def slopes_of(block: RowStatistics, part: slice, factor=chunk_factor, weight=chunk_weight) -> Slopes:
            weight = None if weight is None else weight[part]
            log_sum, at_target, weighted = objective.slopes(block, weight, weight_sum)
            factor = factor[part]
            return Slopes(log_sum * factor, at_target * factor, weighted * factor if weighted else None)

        part = row_kernels.statistics_and_gradients_(
            products, tokens.target[rows], class_weight, head.logits, wanted, slopes_of
        )
        loss += (objective.loss(part, chunk_weight, weight_sum) * weights[rows]).sum()
        tokens.put_statistics(found, rows, part)
        first = rows.start == 0
        if total.hidden is not None:
            _write_hidden_gradient(total.hidden, tokens, rows, products, head.weight)
        if total.weight is not None:
            add_product_(total.weight, products.t(), x, first=first)
        if total.bias is not None:
            total.bias.add_(products.sum(0, dtype=total.bias.dtype))
    return loss, total, found


def gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    known: RowStatistics,  # (N,) each
    slopes: Slopes,  # (N,) each
    ignore_index: int,
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: Settings,
) -> Gradients:
    """The gradients in the dtypes of their tensors, from statistics and the slopes of the loss in them."""
    tokens = CountedTokens(target, ignore_index, len(head.weight))
    total = _new_gradients(hidden, head, needed, None, zero=len(tokens) == 0, keep=tokens.all_kept)
    if len(tokens) == 0:
        return total
    slopes = slopes.map(lambda slope: tokens.mask(tokens.select(slope)) * head.logits.scale)
    known = known.map(tokens.select)
    x = tokens.select(hidden).to(settings.compute_dtype)  # (n, D)
    block_size = plan.vocab_per_block(
        len(tokens),
        len(head.weight),
        compute_dtype=settings.compute_dtype,
        chunk_size=settings.chunk_size,
        memory_budget=settings.memory_budget,
    )
    one_block = block_size >= len(head.weight)
    total_dtype = torch.promote_types(settings.accumulate_dtype, settings.compute_dtype)
    hidden_total = None
    if total.hidden is not None:
        hidden_total = x.new_empty(x.shape, dtype=settings.compute_dtype if one_block else total_dtype)
    buffer = x.new_empty(len(tokens) * block_size)
    for start in range(0, len(head.weight), block_size):
        words = slice(start, min(start + block_size, len(head.weight)))
        part = Head(
            head.weight[words],
            None if head.bias is None else head.bias[words],
            head.logits,
            None if head.class_weight is None else head.class_weight[words],
        ).to(settings.compute_dtype)
        products = project(x, part.weight, part.bias, buffer[: len(tokens) * len(part.weight)].view(len(tokens), -1))
        column = tokens.target - start
        here = (column >= 0) & (column < len(part.weight))
        row_kernels.logit_gradients(
            products,
            column.where(here, 0),
            part.class_weight,
            part.logits,
            slopes._replace(target=slopes.target.where(here, 0)),
            known,
            out=products,
        )
        if hidden_total is not None:
            add_product_(hidden_total, products, part.weight, first=start == 0)
        if total.weight is not None:
            add_product_(total.weight[words], products.t(), x, first=True)
        if total.bias is not None:
            total.bias[words] = products.sum(0, dtype=known.log_sum.dtype)
    if hidden_total is not None:
        tokens.put(total.hidden, slice(None), hidden_total)
    return total


def _chunks(
    hidden: Tensor,  # (N, D)
    head: Head,  # in the compute dtype
    tokens: CountedTokens,
    chunk: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk's rows among the counted tokens, hidden states (C, D) and products with the head (C, V)."""
    vocab_size = len(head.weight)
    buffer = head.weight.new_empty(min(chunk, len(tokens)), vocab_size)
    for rows in tokens.blocks(chunk):
        x = tokens.select(hidden, rows).to(head.weight.dtype)
        yield rows, x, project(x, head.weight, head.bias, out=buffer[: len(x)])


def _new_gradients(
    hidden: Tensor,
    head: Head,
    needed: tuple[bool, bool, bool],
    total_dtype: torch.dtype | None,  # of the head's gradients; None: that of each tensor
    *,
    zero: bool,  # no product will be written
    keep: bool,  # every token's row will be written
) -> Gradients:
    def new(tensor: Tensor | None, need: bool, dtype: torch.dtype | None, empty: bool) -> Tensor | None:
        if not need:
            return None
        make = torch.empty if empty else torch.zeros
        return make(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    return Gradients(
        new(hidden, needed[0], None, keep and not zero),
        new(head.weight, needed[1], total_dtype, not zero),
        new(head.bias, needed[2], total_dtype, False),
    )


def _write_hidden_gradient(
    total: Tensor,  # (N, D)
    tokens: CountedTokens,
    rows: slice,
    products: Tensor,  # (C, V) gradients of the logits
    weight: Tensor,  # (V, D)
) -> None:
    if tokens.all_kept and total.dtype == products.dtype:
        torch.mm(products, weight, out=total[rows])
    else:
        tokens.put(total, rows, products @ weight)
