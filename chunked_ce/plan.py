"""How many tokens a chunk holds, and the memory that follows from it.

The work on a chunk of C tokens needs C * V logits. Few tokens starve the products, and the gradient of the head is
read and written once per chunk; many tokens cost memory. So a chunk takes what its budget allows, and chunks are of
equal size.

The budget, unless a user sets one, is 64 MiB, or two thirds of an fp32 gradient of the head where that is more: by
then the head's gradient decides the peak. Where the head's gradient is narrower than the sum over several chunks has
to be, one chunk needs no such sum, so its logits may take the sum's memory as well.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from chunked_ce.engine.products import product_rows
from chunked_ce.engine.rows import rows_in_flight, work_dtype
from chunked_ce.options import ChunkOptions

__all__ = ["MemoryPrediction", "predict_memory", "head_sum_dtype", "tokens_per_chunk", "vocab_per_block"]

_LEAST_BUDGET = 64 * 2**20


def _budget(vocab_size: int, hidden_size: int, memory_budget: int | None, sums_head: bool) -> int:
    if memory_budget is not None:
        return memory_budget
    return max(_LEAST_BUDGET, 8 * vocab_size * hidden_size // 3) if sums_head else _LEAST_BUDGET


def tokens_per_chunk(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    compute_dtype: torch.dtype,
    head_dtype: torch.dtype | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> int:
    """Tokens in a chunk, at least 1.

    ``compute_dtype`` is the products' dtype, ``head_dtype`` that of the head's gradient where chunks add up to one
    (the forward way with a trainable head).

    >>> tokens_per_chunk(8192, 262144, 512, compute_dtype=torch.bfloat16)
    128
    >>> tokens_per_chunk(8192, 262144, 512, compute_dtype=torch.bfloat16, chunk_size=1000)
    1000
    """
    if chunk_size is not None:
        return chunk_size
    budget = _budget(vocab_size, hidden_size, memory_budget, head_dtype is not None)
    token_bytes = max(1, vocab_size * compute_dtype.itemsize)
    if memory_budget is None and head_dtype == compute_dtype != torch.float16:
        sum_bytes = vocab_size * hidden_size * accumulate_dtype.itemsize
        spared = sum_bytes if head_dtype.itemsize < accumulate_dtype.itemsize else 0
        if num_tokens * token_bytes <= budget + spared:
            return max(1, num_tokens)
    return _even(num_tokens, max(1, budget // token_bytes))


def head_sum_dtype(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    compute_dtype: torch.dtype,
    head_dtype: torch.dtype,
    accumulate_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> torch.dtype:
    """The dtype that the head's gradient is summed in over chunks: its own if there is only one chunk.

    An fp16 gradient is always summed in ``accumulate_dtype``: before it is divided by the token count it can overflow.
    """
    chunk = tokens_per_chunk(
        num_tokens,
        vocab_size,
        hidden_size,
        compute_dtype=compute_dtype,
        head_dtype=head_dtype,
        accumulate_dtype=accumulate_dtype,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
    )
    if num_tokens <= chunk and head_dtype == compute_dtype != torch.float16:
        return head_dtype
    return torch.promote_types(accumulate_dtype, compute_dtype)


def vocab_per_block(
    num_tokens: int,
    vocab_size: int,
    *,
    compute_dtype: torch.dtype,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> int:
    """Words in a block of the vocabulary in the backward way, at least 1.

    A block of all tokens is given as many logits as a chunk of ``chunk_size`` tokens and all words would have.

    >>> vocab_per_block(8192, 262144, compute_dtype=torch.bfloat16)
    4096
    """
    if chunk_size is not None:
        most = chunk_size * vocab_size // max(1, num_tokens)
    else:
        most = _budget(vocab_size, 0, memory_budget, False) // max(1, num_tokens * compute_dtype.itemsize)
    return _even(vocab_size, max(1, most))


def _even(total: int, most: int) -> int:
    """The size of equal parts of ``total``, none larger than ``most``."""
    parts = math.ceil(total / most)
    return max(1, math.ceil(total / max(1, parts)))
