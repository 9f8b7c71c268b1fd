"""The two halves of the loss of logits that exist: statistics of their rows, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce.engine.counted import CountedTokens
from chunked_ce.engine.kernels import row_kernels as choose_row_kernels
from chunked_ce.engine.rows import Slopes, Wanted, empty_statistics
from chunked_ce.objective import Logits, RowStatistics

__all__ = ["gradients", "statistics"]


def statistics(
    products: Tensor,  # (N, V), the logits before scale and softcap
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    ignore_index: int,
    wanted: Wanted,
    backend: str = "auto",
) -> RowStatistics:
    """The statistics of every row, (N,) each and 0 for tokens that do not count."""
    tokens = CountedTokens(target, ignore_index, products.shape[-1])
    row_kernels = choose_row_kernels(backend, products.device, products.dtype)
    found = empty_statistics(len(target), products.dtype, products.device, wanted)
    for rows in tokens.blocks(row_kernels.rows_in_flight(products.shape[-1], products.device.type)):
        block = tokens.unmasked(products, rows)
        copied = not tokens.all_kept
        part = row_kernels.statistics(block, tokens.target[rows], class_weight, logits, wanted, overwrite=copied)
        tokens.put_statistics(found, rows, part)
    return found


def gradients(
    products: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    logits: Logits,
    known: RowStatistics,  # (N,) each
    slopes: Slopes,  # (N,) each
    ignore_index: int,
    backend: str = "auto",
    words: tuple[int, int] | None = None,
) -> Tensor:
    """The gradient of the products, in their dtype, from statistics and the slopes of the loss in them.

    ``words`` are the first word that a shard of the vocabulary holds, and the words of all shards.
    """
    first_word, vocab_size = words or (0, products.shape[-1])
    tokens = CountedTokens(target, ignore_index, vocab_size)
    column = tokens.columns(first_word, products.shape[-1])
    slopes = slopes.map(lambda slope: tokens.mask(tokens.select(slope)) * logits.scale)
    known = known.map(tokens.select)
    row_kernels = choose_row_kernels(backend, products.device, products.dtype)
    total = torch.empty_like(products) if tokens.all_kept else torch.zeros_like(products)
    for rows in tokens.blocks(row_kernels.rows_in_flight(products.shape[-1], products.device.type)):
        block = tokens.unmasked(products, rows)  # the slopes of tokens that do not count are 0
        out = total[rows] if tokens.all_kept else block
        row_kernels.logit_gradients(block, column[rows], class_weight, logits, slopes.at(rows), known.at(rows), out=out)
        if not tokens.all_kept:
            tokens.put(total, rows, out)
    return total
