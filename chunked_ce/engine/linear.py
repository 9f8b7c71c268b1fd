"""The chunk loops: a head's product, the row kernels and the gradients' products, one chunk after another.

`loss_and_gradients` is the forward way: each chunk's logit gradients are used at once. `statistics` and `gradients`
are the two halves of the backward way, in which logits are formed again, one block of the vocabulary at a time.
Everything here takes plain tensors and computes no graph; `chunked_ce.engine.ops` gives it to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.engine.backprop import (
    Backprop,
    Gradients,
    Targets,
    adds_directly,
    new_gradients,
    new_targets,
    power_of_two,
)
from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.filtered import Filter
from chunked_ce.engine.kernels import row_kernels as choose_row_kernels
from chunked_ce.engine.products import add_product_, project, rounds_products, unrounded
from chunked_ce.engine.rows import Slopes, Wanted, empty_statistics, work_dtype
from chunked_ce.engine.scratch import logits_scratch
from chunked_ce.objective import Logits, Objective, RowStatistics, merge_shards, statistics_of

__all__ = [
    "Head",
    "Settings",
    "Sums",
    "gradients",
    "keeps_targets",
    "loss_and_gradients",
    "new_filter",
    "shard_statistics",
    "statistics",
]


_MOST_GROWTH = 2.0**64  # of a chunk's scale over that of an earlier one, whose sums in fp32 it multiplies
_PLANNED = ("compute_dtype", "accumulate_dtype", "chunk_size", "memory_budget")


class Head(NamedTuple):
    """The output projection and what follows it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logits: Logits
    class_weight: Tensor | None  # (V,) in the work dtype

    def part(self, words: slice) -> Head:
        """The rows ``words``."""
        bias, classes = (None if of is None else of[words] for of in (self.bias, self.class_weight))
        return self._replace(weight=self.weight[words], bias=bias, class_weight=classes)

    def to(self, dtype: torch.dtype) -> Head:
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))


class Settings(NamedTuple):
    """How to compute, as `ChunkOptions` and the autocast state say; None lets the plan choose."""

    compute_dtype: torch.dtype
    accumulate_dtype: torch.dtype
    chunk_size: int | None
    memory_budget: int | None
    backend: str = "auto"
    gradient_filter: float | None = None
    accumulate_into: str | None = None
    head_sum_dtype: torch.dtype | None = None  # of the forward way's head gradients; None: as many chunks need

    @property
    def planned(self) -> dict[str, Any]:
        """What `chunked_ce.plan` takes."""
        return {name: getattr(self, name) for name in _PLANNED}

    def planned_head_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype that the plan sums the head's gradients for."""
        return self.head_sum_dtype or weight.dtype

    @property
    def scales_chunks(self) -> bool:
        """Whether the gradients of a chunk's logits are multiplied by what brings them into the range of the dtype."""
        return self.compute_dtype == torch.float16

    def row_kernels(self, device: torch.device) -> ModuleType:
        return choose_row_kernels(self.backend, device, self.compute_dtype)


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
    found = empty_statistics(len(target), settings.compute_dtype, hidden.device, wanted)
    if len(tokens) > 0:
        part = shard_statistics(hidden, head, tokens, 0, wanted, settings)
        tokens.put_statistics(found, slice(None), statistics_of(part, tokens.target, **wanted._asdict()))
    return found


def shard_statistics(
    hidden: Tensor,  # (N, D)
    head: Head,  # V_r rows
    tokens: CountedTokens,
    first_word: int,
    wanted: Wanted,
    settings: Settings,
) -> Tensor:
    """This shard's part of the statistics of the counted tokens, (n, columns): see `chunked_ce.objective.merge_shards`.

    From the same blocks of logits as `gradients`, formed by the same products, so that the two do not differ in their
    rounding: beside ``1 - p`` of a confident token that is much.
    """
    row_kernels = settings.row_kernels(hidden.device)
    merged = None
    for block in _vocab_blocks(hidden, head, tokens, first_word, settings):
        part = row_kernels.shard_statistics(
            block.products,
            block.column.clamp(min=0),
            block.column >= 0,
            block.head.class_weight,
            head.logits,
            wanted,
            first_word + block.words.start,
            overwrite=True,
        ).double()
        merged = part if merged is None else merge_shards(torch.stack([merged, part]), **wanted._asdict())
    return merged.to(work_dtype(settings.compute_dtype))


def loss_and_gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    coefficient: Tensor,  # (N,) float64, what each token's loss is multiplied by
    objective: Objective,
    ignore_index: int,
    wanted: Wanted,
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: Settings,
) -> tuple[Tensor, Gradients, Tensor | None, RowStatistics]:
    """The sum of the losses (), its gradients, the gradients of the targets' logits, and the statistics of every row.

    The gradients come in the dtypes that they are summed in. Where that of the weight is narrow, what the targets give
    is not in it, but remains to be added with the gradients of their logits, (N,) in fp32.
    """
    tokens = CountedTokens(target, ignore_index, len(head.weight))
    planned = {"head_dtype": settings.planned_head_dtype(head.weight) if needed[1] else None, **settings.planned}
    chunk = plan.tokens_per_chunk(len(tokens), *head.weight.shape, **planned)
    head_sum_dtype = plan.head_sum_dtype(len(target), *head.weight.shape, **planned)
    sums = Sums(hidden, head, tokens, coefficient, objective, wanted, needed, settings, head_sum_dtype)
    head = head.to(settings.compute_dtype)
    row_kernels = settings.row_kernels(hidden.device)
    backprop = Backprop(sums.gradients, head.weight, new_filter(head, settings, smoothed=wanted.weighted), row_kernels)
    for rows, x, products in _chunks(hidden, head, tokens, chunk):
        column = tokens.target[rows]
        arguments = products, column, head.class_weight, head.logits
        columns, targets = backprop.new_columns(), backprop.new_targets(column)
        outputs = {"columns": columns} | ({} if targets is None else {"apart": targets.gradient})
        scale = None
        if settings.scales_chunks:
            part = row_kernels.statistics(*arguments, wanted, overwrite=False)
            slopes, scale = sums.scaled_slopes(rows, part, largest=backprop.largest_gradient)
            row_kernels.logit_gradients(*arguments, slopes, part, out=products, **outputs)
        else:
            slopes_of = functools.partial(sums.slopes, rows)
            part = row_kernels.statistics_and_gradients_(*arguments, wanted, slopes_of, **outputs)
            slopes = sums.slopes(rows, part)
        sums.add_losses(rows, part)
        backprop.set_scale(scale)
        kept = backprop.keep(products, columns, column, slopes)
        backprop.put_hidden(tokens, rows, products, kept, targets)
        backprop.add_head(x, products, kept, targets, weight_later=sums.keep_targets(rows, targets))
    backprop.finish()
    return sums.loss, sums.gradients, sums.targets, sums.statistics


def keeps_targets(hidden: Tensor, head_sum_dtype: torch.dtype, num_tokens: int, settings: Settings) -> bool:
    """Whether what the targets give to the head is added in the backward: the narrow gradient of a single chunk would
    round it twice.

    Not with a sequence shard, whose other hidden states are gone by then.
    """
    narrow = head_sum_dtype not in (unrounded(head_sum_dtype), settings.accumulate_dtype)
    rounds = rounds_products(hidden.device.type, settings.compute_dtype)
    return narrow and rounds and hidden.shape[0] == num_tokens


class Sums:
    """What the chunks of the forward way add up to: the loss, its gradients, and the statistics of every row."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        head: Head,
        tokens: CountedTokens,
        coefficient: Tensor,  # (N,) float64
        objective: Objective,
        wanted: Wanted,
        needed: tuple[bool, bool, bool],
        settings: Settings,
        head_sum_dtype: torch.dtype,
    ) -> None:
        self._dtype = work_dtype(settings.compute_dtype)
        self.gradients = new_gradients(
            hidden,
            head.weight,
            head.bias,
            tokens,
            needed,
            head_sum_dtype,
            unrounded(hidden.dtype),
            zero_head=settings.gradient_filter is not None,
            bias_dtype=torch.promote_types(head_sum_dtype, settings.accumulate_dtype),
        )
        self.statistics = empty_statistics(tokens.num_tokens, self._dtype, hidden.device, wanted)
        later = needed[1] and keeps_targets(hidden, head_sum_dtype, tokens.num_tokens, settings)
        self.targets = torch.zeros(tokens.num_tokens, dtype=torch.float32, device=hidden.device) if later else None
        self._tokens = tokens
        self._objective = objective
        self._losses = torch.zeros_like(tokens.target, dtype=coefficient.dtype)  # (n,)
        self._coefficient = tokens.mask(tokens.select(coefficient))  # (n,)
        self._scale = head.logits.scale
        classes = head.class_weight
        self._class_weight = None if classes is None else classes[tokens.target]  # (n,)
        self._weight_sum = float(objective.vocab_size) if classes is None else classes.sum()
        self._largest_weight = 1.0 if classes is None else classes.abs().amax()
        self._least_scale = self._coefficient.new_full((), torch.inf)

    @property
    def loss(self) -> Tensor:
        """The sum of the losses, ()."""
        return self._losses.sum().to(self._dtype)

    def slopes(self, rows: slice, block: RowStatistics, part: slice = slice(None)) -> Slopes:
        """The slopes of the rows ``part`` of the tokens ``rows``, whose statistics are ``block``."""
        return self._slopes(rows, block, part).map(lambda slope: slope.to(self._dtype))

    def scaled_slopes(self, rows: slice, block: RowStatistics, *, largest: float) -> tuple[Slopes, Tensor]:
        """The slopes of the tokens ``rows`` times a power of two (), with which no gradient of their logits exceeds
        ``largest`` and the largest is not far from it; and that power of two."""
        slopes = self._slopes(rows, block)
        scale = power_of_two(largest / self._bound(slopes, block).amax())
        scale = torch.minimum(scale, self._least_scale * _MOST_GROWTH)
        self._least_scale = torch.minimum(scale, self._least_scale)
        return slopes.map(lambda slope: (slope * scale).to(self._dtype)), scale

    def _slopes(self, rows: slice, block: RowStatistics, part: slice = slice(None)) -> Slopes:
        """In the coefficients' dtype, which a weight and its reciprocal are in the range of."""
        weight = None if self._class_weight is None else self._class_weight[rows][part]
        log_sum, target, weighted = self._objective.slopes(block, weight, self._weight_sum)
        factor = self._coefficient[rows][part] * self._scale
        return Slopes(log_sum * factor, target * factor, weighted * factor if weighted else None)

    def _bound(self, slopes: Slopes, block: RowStatistics) -> Tensor:
        """What no gradient of a row's logits exceeds, (n,): those of the words besides the target have its sign and
        share 1 - p of it."""
        rest = -torch.expm1(block.target - block.log_sum)  # 1 - p of the target
        rest = rest.clamp(min=torch.finfo(rest.dtype).eps)  # words are there that their sum with 1 does not show
        bound = slopes.log_sum.abs() * rest + (slopes.log_sum + slopes.target).abs()
        return bound if slopes.weighted is None else bound + slopes.weighted.abs() * self._largest_weight

    def keep_targets(self, rows: slice, targets: Targets | None) -> bool:
        """Keep the gradients of the targets' logits of the tokens ``rows``, if they are for later."""
        if targets is None or self.targets is None:
            return False
        self._tokens.put(self.targets, rows, targets.gradient)
        return True

    def add_losses(self, rows: slice, part: RowStatistics) -> None:
        """Put the losses of the tokens ``rows`` and their statistics into place."""
        weight = None if self._class_weight is None else self._class_weight[rows]
        self._losses[rows] = self._objective.loss(part, weight, self._weight_sum) * self._coefficient[rows]
        self._tokens.put_statistics(self.statistics, rows, part)


def gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,)
    known: RowStatistics,  # (N,) each
    slopes: Slopes,  # (N,) each
    ignore_index: int,
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: Settings,
    words: tuple[int, int] | None = None,
    hidden_dtype: torch.dtype | None = None,
    weight_sum: Tensor | None = None,
) -> Gradients:
    """The gradients in the dtypes of their tensors, from statistics and the slopes of the loss in them.

    ``words`` are the first word that a shard of the vocabulary holds, and the words of all shards, over which the
    gradient of the hidden states is yet to be summed, in ``hidden_dtype``. The weight's gradient is added to
    ``weight_sum`` where there is one.
    """
    first_word, vocab_size = words or (0, len(head.weight))
    tokens = CountedTokens(target, ignore_index, vocab_size)
    slopes = slopes.map(lambda slope: tokens.mask(tokens.select(slope)) * head.logits.scale)
    known = known.map(tokens.select)
    kinds = {"smoothed": slopes.weighted is not None, "entropy": slopes.mean is not None}
    if settings.gradient_filter is not None and len(tokens) > 0:
        compute_head = head.to(settings.compute_dtype)
        filter = new_filter(compute_head, settings, vocab_size=vocab_size, **kinds)
        if filter is not None:
            arguments = (hidden, head, compute_head, tokens, known, slopes, first_word, needed, settings, filter)
            return _filtered_gradients(*arguments, hidden_dtype, weight_sum)
    needed = (needed[0], needed[1] and weight_sum is None, needed[2])
    total = new_gradients(hidden, head.weight, head.bias, tokens, needed, hidden_dtype=hidden_dtype)
    if len(tokens) == 0:
        return total
    total_dtype = torch.promote_types(settings.accumulate_dtype, settings.compute_dtype)
    hidden_total = None
    row_kernels = settings.row_kernels(hidden.device)
    for words, part, x, column, products in _vocab_blocks(hidden, head, tokens, first_word, settings):
        several = len(part.weight) < len(head.weight)
        apart = new_targets(column, x.dtype, row_kernels) if several and total.hidden is not None else None
        arguments = products, column, part.class_weight, part.logits, slopes, known
        row_kernels.logit_gradients(*arguments, out=products, **({} if apart is None else {"apart": apart.gradient}))
        if total.hidden is not None:
            first = hidden_total is None
            if first:
                hidden_total = x.new_empty(x.shape, dtype=total_dtype if several else x.dtype)
            add_product_(hidden_total, products, part.weight, first=first)
        if apart is not None:
            hidden_total = apart.add_hidden(hidden_total, part.weight)
            apart.put_back_(products)
        if total.weight is not None:
            add_product_(total.weight[words], products.t(), x, first=True)
        elif weight_sum is not None:
            add_product_(weight_sum[words], products.t(), x, first=False, apart=True)
        if total.bias is not None:
            total.bias[words] = products.sum(0, dtype=known.log_sum.dtype)
    if hidden_total is not None:
        tokens.put(total.hidden, slice(None), hidden_total)
    return total


class _VocabBlock(NamedTuple):
    """Some words of the head, and all counted tokens."""

    words: slice
    head: Head  # (B, D) in the products' dtype
    x: Tensor  # (n, D)
    column: Tensor  # (n,) of the target, -1 where it is none of these words
    products: Tensor  # (n, B)


def _vocab_blocks(
    hidden: Tensor,  # (N, D)
    head: Head,
    tokens: CountedTokens,
    first_word: int,
    settings: Settings,
) -> Iterator[_VocabBlock]:
    """The products of all counted tokens with the head, one block of the vocabulary at a time; one without words
    where the head has none."""
    x = tokens.select(hidden).to(settings.compute_dtype)
    vocab_size = len(head.weight)
    block_size = plan.vocab_per_block(
        len(tokens),
        vocab_size,
        compute_dtype=settings.compute_dtype,
        chunk_size=settings.chunk_size,
        memory_budget=settings.memory_budget,
    )
    buffer = logits_scratch(len(tokens), min(block_size, vocab_size), dtype=x.dtype, device=x.device)
    for start in range(0, max(1, vocab_size), block_size):
        words = slice(start, min(start + block_size, vocab_size))
        part = head.part(words).to(settings.compute_dtype)
        products = project(x, part.weight, part.bias, out=buffer[:, : len(part.weight)])
        yield _VocabBlock(words, part, x, tokens.columns(first_word + start, len(part.weight)), products)


def _filtered_gradients(
    hidden: Tensor,  # (N, D)
    like: Head,
    head: Head,  # the same in the products' dtype
    tokens: CountedTokens,
    known: RowStatistics,  # (n,) each
    slopes: Slopes,  # (n,) each
    first_word: int,
    needed: tuple[bool, bool, bool],
    settings: Settings,
    filter: Filter,
    hidden_dtype: torch.dtype | None,
    weight_sum: Tensor | None,
) -> Gradients:
    """`gradients` with the gradient filter: one chunk of tokens after another, as in the forward way."""
    planned = {"head_dtype": like.weight.dtype if needed[1] else None, **settings.planned}
    chunk = plan.tokens_per_chunk(len(tokens), *head.weight.shape, **planned)
    sum_dtype = plan.head_sum_dtype(len(tokens), *head.weight.shape, **planned)
    needed = (needed[0], needed[1] and not adds_directly(weight_sum, sum_dtype), needed[2])
    total = new_gradients(hidden, like.weight, like.bias, tokens, needed, sum_dtype, hidden_dtype, zero_head=True)
    backprop = Backprop(total, head.weight, filter, settings.row_kernels(hidden.device), weight_sum)
    row_kernels = settings.row_kernels(hidden.device)
    column = tokens.columns(first_word, len(head.weight))
    for rows, x, products in _chunks(hidden, head, tokens, chunk):
        columns = backprop.new_columns()
        row_kernels.logit_gradients(
            products,
            column[rows],
            head.class_weight,
            head.logits,
            slopes.at(rows),
            known.at(rows),
            out=products,
            columns=columns,
        )
        kept = backprop.keep(products, columns, column[rows], slopes.at(rows))
        backprop.put_hidden(tokens, rows, products, kept)
        backprop.add_head(x, products, kept)
    return backprop.finish().as_dtype_of(like.weight, like.bias)


def new_filter(
    head: Head,  # in the products' dtype
    settings: Settings,
    *,
    smoothed: bool,
    entropy: bool = False,
    vocab_size: int | None = None,  # of all shards
) -> Filter | None:
    """The gradient filter of one loss; None where there is none, or where it has no tail of low rank.

    The slope of an entropy gives gradients of both signs, and what label smoothing adds under a softcap is not of
    rank one.
    """
    if settings.gradient_filter is None or entropy or (smoothed and head.logits.softcap is not None):
        return None
    share = len(head.weight) / max(1, vocab_size or len(head.weight))
    return Filter(head.weight, head.class_weight, settings.gradient_filter, share)


def _chunks(
    hidden: Tensor,  # (N, D)
    head: Head,  # in the compute dtype
    tokens: CountedTokens,
    chunk: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk's rows among the counted tokens, hidden states (C, D) and products with the head (C, V)."""
    vocab_size = len(head.weight)
    buffer = logits_scratch(min(chunk, len(tokens)), vocab_size, dtype=head.weight.dtype, device=hidden.device)
    for rows in tokens.blocks(chunk):
        x = tokens.select(hidden, rows).to(head.weight.dtype)
        yield rows, x, project(x, head.weight, head.bias, out=buffer[: len(x)])
