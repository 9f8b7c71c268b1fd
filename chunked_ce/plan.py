"""How many tokens a chunk holds, and the memory that follows from it.

The work on a chunk of C tokens needs C * V logits. Few tokens starve the products, and the gradient of the head is
read and written once per chunk; many tokens cost memory. So a chunk takes what its budget allows, and chunks are of
equal size.

The budget, unless a user sets one, is 64 MiB, or two thirds of an fp32 gradient of the head where that is more: by
then the head's gradient decides the peak. On a CUDA device it is at most a quarter of the memory that is free. Where
the head's gradient is narrower than the sum over several chunks has to be, one chunk needs no such sum, so its logits
may take the sum's memory as well.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from chunked_ce.engine.filtered import GROUPS
from chunked_ce.engine.kernels import triton_runs
from chunked_ce.engine.products import (
    PROJECTED_ROWS,
    adds_in_product,
    product_rows,
    rounds_products,
    rounds_within,
    unrounded,
)
from chunked_ce.engine.rows import rows_in_flight, work_dtype
from chunked_ce.options import ChunkOptions

__all__ = [
    "MemoryPrediction",
    "budget_within",
    "head_sum_dtype",
    "predict_memory",
    "tokens_per_chunk",
    "vocab_per_block",
]

_LEAST_BUDGET = 64 * 2**20
_ALIGNED = 16  # words: rows of a block begin where an accelerator reads fastest
# What the matrix library of a CPU keeps of a block of the head's rows while it multiplies: at most so many columns, and
# only from so many tokens on. Measured with torch 2.13 on one and two threads; fp32 is MKL's, bf16 oneDNN's.
_PACKED_COLUMNS = {torch.float32: 384, torch.bfloat16: 256}
_PACKED_FROM_TOKENS = {torch.float32: 192, torch.bfloat16: 1}


def _budget(vocab_size: int, hidden_size: int, memory_budget: int | None, sums_head: bool) -> int:
    if memory_budget is not None:
        return memory_budget
    return max(_LEAST_BUDGET, 8 * vocab_size * hidden_size // 3) if sums_head else _LEAST_BUDGET


def budget_within(free: int, vocab_size: int, hidden_size: int, sums_head: bool) -> int | None:
    """The memory budget on a device with ``free`` bytes: a quarter of them where the usual one is more, else None.

    >>> budget_within(2**40, 262144, 512, True), budget_within(2**20, 262144, 512, True)
    (None, 262144)
    """
    return max(1, free // 4) if _budget(vocab_size, hidden_size, None, sums_head) > free // 4 else None


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
    in_flight: int = 1,
) -> int:
    """Tokens in a chunk, at least 1.

    ``compute_dtype`` is the products' dtype, ``head_dtype`` that of the head's gradient where chunks add up to one
    (the forward way with a trainable head), ``in_flight`` how many chunks' logits there are at a time.

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
    return _even(num_tokens, max(1, budget // in_flight // token_bytes))


def head_sum_dtype(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    compute_dtype: torch.dtype,
    head_dtype: torch.dtype | None,
    accumulate_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    in_flight: int = 1,
) -> torch.dtype:
    """The dtype that the gradients of head and bias are summed in over chunks: the head's if there is only one chunk.

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
        in_flight=in_flight,
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
    if most > _ALIGNED:
        most -= most % _ALIGNED
    size = _even(vocab_size, max(1, most))
    return size if size <= _ALIGNED else min(vocab_size, size + -size % _ALIGNED)


class MemoryPrediction(NamedTuple):
    """Bytes that one loss and its backward take above their inputs, by name, in each of the two phases."""

    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the worse of the two phases."""
        return max(sum(self.forward.values()), sum(self.backward.values()))


def predict_memory(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    train_input: bool = True,
    train_head: bool = True,
    options: ChunkOptions | None = None,
    device_type: str = "cpu",
    ranks: int = 1,
    kept_share: float = 0.08,
) -> MemoryPrediction:
    """The memory law: what `chunked_ce.linear_cross_entropy` allocates for a loss and a backward.

    Args:
        num_tokens, vocab_size, hidden_size: N, V and D.
        dtype: of the input; ``head_dtype`` of the head and ``compute_dtype`` of the products (autocast) if they differ.
        num_counted: tokens that are not ignored; all by default.
        train_input, train_head: whether they need a gradient.
        options: ``gradients="auto"`` stands for the forward way, which sums and means take. ``accumulate_into`` stands
            for a step that adds to a sum that exists, the head's ``grad`` or an fp32 ``main_grad``; it is an input.
        device_type: where it runs.
        kept_share: of the words, what the gradient filter keeps in a chunk; a small model of 131,072 words kept 6 %.
        ranks: that share the vocabulary evenly (`chunked_ce.VocabShard`); the prediction is for the one with most rows.

    Terms in bytes: ``logits`` of one chunk, ``rows`` in flight in fp32, ``hidden_grad`` (in the forward phase as it is
    kept, in fp32 at least), ``head_sum`` (the head's gradient as it is summed over chunks), ``head_grad`` (as it is
    returned, where that is another tensor), ``products`` before they are added to a wider sum, and as wide as it,
    ``hidden_sum`` (what ``hidden_grad`` is rounded from in the backward, where that is another tensor), ``head_copy``
    and ``hidden_copy`` in the products' dtype, and ``statistics`` of the tokens. With several ranks, two chunks'
    ``logits``, and ``collectives``: what is gathered and reduced, without what the backend keeps for itself.
    With a gradient filter, ``kept`` columns, their rows of the head and of its gradient, and ``tails`` for all chunks.
    ``packed`` is a block of the head as the matrix library of a CPU rearranges it. Not in it is what else that library
    and the C allocator keep for themselves: 1 to 8 MiB on two cores.

    >>> law = predict_memory(4096, 131072, 256, dtype=torch.float32)
    >>> law.forward["logits"] // 2**20, law.forward["head_sum"] // 2**20
    (82, 128)
    """
    options = options or ChunkOptions()
    head_dtype = head_dtype or dtype
    compute_dtype = compute_dtype or dtype
    counted = num_tokens if num_counted is None else num_counted
    sharded = ranks > 1
    vocab_size = math.ceil(vocab_size / ranks)
    settings = {
        "compute_dtype": compute_dtype,
        "chunk_size": None if options.chunk_size == "auto" else options.chunk_size,
        "memory_budget": options.memory_budget,
    }
    accumulate_dtype = options.accumulate_dtype
    wide = torch.promote_types(accumulate_dtype, compute_dtype)
    work = work_dtype(compute_dtype)
    head_elements = vocab_size * hidden_size
    in_forward = not options.in_backward
    filtered = options.filter_threshold(compute_dtype) is not None
    added = options.accumulate_into is not None and train_head  # to a sum that exists: the backward holds no other

    head_sum_of = functools.partial(
        head_sum_dtype,
        num_tokens,
        vocab_size,
        hidden_size,
        head_dtype=head_dtype,
        accumulate_dtype=accumulate_dtype,
    )
    in_flight = 2 if sharded else 1
    chunk = tokens_per_chunk(
        num_tokens if sharded else counted,
        vocab_size,
        hidden_size,
        head_dtype=head_dtype if (in_forward or filtered) and train_head else None,
        accumulate_dtype=accumulate_dtype,
        in_flight=in_flight,
        **settings,
    )
    chunk = min(chunk, counted)
    at_a_time = min(in_flight, math.ceil(counted / max(1, chunk)))

    on_cuda = device_type == "cuda" and options.backend != "torch"
    in_registers = on_cuda and triton_runs(torch.device(device_type), compute_dtype)

    def rows_and_logits(tokens: int, words: int, buffers: int = 1, keeps: bool = False) -> dict[str, int]:
        copies = not in_registers and (keeps or compute_dtype != work)
        return {
            "logits": buffers * tokens * words * compute_dtype.itemsize,
            "rows": copies * min(tokens, rows_in_flight(words, device_type)) * words * work.itemsize,
        }

    def product(total_rows: int, inner: int, wider: torch.dtype, adds: bool, apart: bool = False) -> int:
        step = product_rows(total_rows, device_type)
        part, widened = step * hidden_size * compute_dtype.itemsize, step * hidden_size * wider.itemsize
        if wider == compute_dtype:
            return part if apart and rounds_within(device_type, wider) else 0
        if adds_in_product(device_type, wider, compute_dtype):
            return 0
        if compute_dtype == torch.float16:  # formed from wider factors
            return widened + (step + hidden_size) * inner * wider.itemsize
        return part + adds * widened

    def products_of(input_product: int, head_product: int, tokens: int) -> int:
        """Of the products for input and head, with the targets' terms where these are apart."""
        terms = tokens * hidden_size * (compute_dtype.itemsize + 4) * rounds_products(device_type, compute_dtype)
        return max(train_input * (input_product + terms), train_head * (head_product or terms))

    common = {"statistics": num_tokens * (3 * work.itemsize + 16)}
    if in_forward:
        tokens, words = chunk, vocab_size
    else:
        tokens, words = counted, min(vocab_size, vocab_per_block(counted, vocab_size, **settings))
    forward = rows_and_logits(tokens, words, at_a_time if in_forward else 1, sharded and in_forward) | common
    if device_type == "cpu" and tokens >= _PACKED_FROM_TOKENS.get(compute_dtype, math.inf):
        block = min(words, PROJECTED_ROWS) * min(hidden_size, _PACKED_COLUMNS[compute_dtype])
        common = common | {"packed": block * compute_dtype.itemsize}
        forward |= common
    if sharded:
        gathered = at_a_time * (ranks + 1) * chunk * 3 * work.itemsize
        parts = compute_dtype.itemsize * (wide != compute_dtype) + wide.itemsize
        forward["collectives"] = gathered + in_forward * train_input * chunk * hidden_size * parts
    if head_dtype != compute_dtype:
        forward["head_copy"] = words * hidden_size * compute_dtype.itemsize
    if counted < num_tokens or dtype != compute_dtype:
        forward["hidden_copy"] = tokens * hidden_size * compute_dtype.itemsize

    def filter_terms(total: torch.dtype) -> dict[str, int]:
        kept = math.ceil(kept_share * vocab_size)
        rows = kept * hidden_size * max(compute_dtype.itemsize, train_head * total.itemsize)
        columns = vocab_size * (4 + 4 * GROUPS) * work.itemsize  # of the chunk at hand, indices of 8 bytes among them
        chunks = math.ceil(counted / max(1, chunk))
        return {
            "kept": chunk * kept * compute_dtype.itemsize + rows,
            "tails": columns + train_head * 2 * chunks * vocab_size * GROUPS * work.itemsize,
        }

    hidden_elements = train_input * num_tokens * hidden_size
    gradients = {"hidden_grad": hidden_elements * dtype.itemsize}
    if in_forward:
        total_dtype, hidden_total = head_sum_of(in_flight=in_flight, **settings), unrounded(dtype)
        sums = {
            "hidden_grad": hidden_elements * hidden_total.itemsize,
            "head_sum": train_head * head_elements * total_dtype.itemsize,
        }
        forward |= sums
        if filtered:
            forward |= filter_terms(total_dtype)
        else:
            forward["products"] = products_of(0, product(vocab_size, chunk, total_dtype, counted > chunk), chunk)
        converted = train_head and total_dtype != head_dtype
        backward = sums | common | {"head_grad": converted * head_elements * head_dtype.itemsize}
        if hidden_total != dtype:
            backward |= gradients | {"hidden_sum": sums["hidden_grad"]}
        return MemoryPrediction(forward, backward)

    main_dtype = torch.promote_types(head_dtype, torch.float32)
    into = main_dtype if options.accumulate_into == "main_grad" else head_dtype
    if filtered:
        total_dtype = head_sum_of(**settings)
        sums = train_head and not (added and torch.promote_types(into, total_dtype) == into)
        total_dtype = total_dtype if sums else into
        backward = rows_and_logits(chunk, vocab_size, keeps=True) | common | gradients | filter_terms(total_dtype)
        backward["head_sum"] = sums * head_elements * total_dtype.itemsize
        backward["head_grad"] = (sums and not added and total_dtype != head_dtype) * head_elements * head_dtype.itemsize
        widens = sums and added and device_type == "cpu"  # the sum that exists, to add to it
        backward["products"] = widens * head_elements * total_dtype.itemsize
        backward |= {name: size for name, size in forward.items() if name in ("head_copy", "hidden_copy")}
        return MemoryPrediction(forward, backward)

    hidden_total = compute_dtype if words == vocab_size else wide
    gradients["head_grad"] = (train_head and not added) * head_elements * head_dtype.itemsize
    backward = rows_and_logits(counted, words) | gradients | common
    backward["hidden_sum"] = train_input * counted * hidden_size * hidden_total.itemsize
    backward["products"] = products_of(
        product(counted, words, hidden_total, words < vocab_size),
        product(words, counted, into if added else head_dtype, added, apart=added),
        math.ceil(counted * words / vocab_size) * (words < vocab_size),
    )
    if sharded:
        backward["collectives"] = train_input * num_tokens * hidden_size * wide.itemsize
    if counted < num_tokens or dtype != compute_dtype:
        backward["hidden_copy"] = counted * hidden_size * compute_dtype.itemsize
    if head_dtype != compute_dtype:
        backward["head_copy"] = words * hidden_size * compute_dtype.itemsize
    return MemoryPrediction(forward, backward)


def _even(total: int, most: int) -> int:
    """The size of equal parts of ``total``, none larger than ``most``."""
    parts = math.ceil(total / most)
    return max(1, math.ceil(total / max(1, parts)))
