"""What a head that is sharded over data ranks costs each of them, and what gathering it costs instead.

R ranks have N counted tokens each in a micro-batch, hidden states of size D, and V / R rows of the head.
"""

from __future__ import annotations

import math

from chunked_ce.devices import product_rows, unrounded
from chunked_ce.light import torch
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import MemoryPrediction, Plan, Settings
from chunked_ce.rows.sizes import rows_in_flight, work_dtype

__all__ = ["bytes_sent_gathered", "bytes_sent_sharded", "most_tokens", "predict_sharded_memory"]

_STATISTICS = 3  # numbers per token that each rank sends for a cross-entropy: maximum, sum of exponentials, target
_PER_TOKEN = 16  # bytes of target and coefficient


def bytes_sent_sharded(
    num_tokens: int, hidden_size: int, ranks: int, *, itemsize: int = 2, statistics: int = _STATISTICS
) -> int:
    """Bytes that a rank sends for one loss with gradients in the forward, and its backward.

    Its N hidden states go to all others in their dtype, and their gradients come back in fp32; it sends ``statistics``
    in fp32 for the tokens of all ranks, and target and coefficient of its own:
    (R - 1) * N * (D * (itemsize + 4) + 4 * statistics * R + 16), if collectives go round a ring.

    >>> bytes_sent_sharded(8192, 4096, 8) // 2**20, bytes_sent_gathered(262144, 4096, 8) // 2**20
    (1350, 3584)
    """
    per_token = hidden_size * (itemsize + 4) + 4 * statistics * ranks + _PER_TOKEN
    return (ranks - 1) * num_tokens * per_token


def bytes_sent_gathered(vocab_size: int, hidden_size: int, ranks: int, *, itemsize: int = 2, gathers: int = 1) -> int:
    """Bytes that a rank sends to gather a head ``gathers`` times and to reduce-scatter its gradient, both in elements
    of ``itemsize``: (R - 1) / R * V * D * itemsize * (gathers + 1)."""
    return (ranks - 1) * vocab_size * hidden_size * itemsize * (gathers + 1) // ranks


def most_tokens(vocab_size: int, hidden_size: int, ranks: int, *, itemsize: int = 2, gathers: int = 1) -> int:
    """The most counted tokens per rank with which a sharded head sends no more than a gathered one.

    About V / R * itemsize * (gathers + 1) / (itemsize + 4): the tokens of all ranks together may be about as many as
    the vocabulary has entries with fp32, two thirds of that with bf16.

    >>> most_tokens(262144, 4096, 8), most_tokens(262144, 4096, 64)
    (21746, 2646)
    """
    gathered = bytes_sent_gathered(vocab_size, hidden_size, ranks, itemsize=itemsize, gathers=gathers)
    return gathered // max(1, bytes_sent_sharded(1, hidden_size, ranks, itemsize=itemsize))


def predict_sharded_memory(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    ranks: int,
    dtype: torch.dtype,
    options: ChunkOptions | None = None,
    device_type: str = "cpu",
) -> MemoryPrediction:
    """The memory law with ``VocabShard(tokens="own")``: what a loss and its backward allocate on a rank.

    Args:
        num_tokens: N of each rank, all of which count.
        vocab_size, hidden_size: V of all ranks, and D.
        ranks: how many share the head evenly; the prediction is for the largest shard.
        dtype: of hidden states and head.

    The terms are those of `chunked_ce.plan.predict_memory`, in bytes. ``logits`` are of two chunks of all ranks'
    tokens, ``head_sum`` and ``head_grad`` of this rank's rows, ``hidden_grad`` of its own tokens; ``collectives`` has
    the hidden states of two chunks, and the gradient of one.
    """
    options = options or ChunkOptions()
    settings = Settings.of(options, dtype, device_type)
    settings = settings._replace(head_sum_dtype=settings.wide_dtype)
    wide, work, rows = settings.wide_dtype, work_dtype(dtype), math.ceil(vocab_size / ranks)
    tokens = ranks * num_tokens
    plan = Plan.by_tokens(tokens, tokens, rows, hidden_size, settings, head_dtype=wide, in_flight=2)
    chunk = min(plan.tokens, tokens)
    at_a_time = min(plan.in_flight, math.ceil(tokens / max(1, chunk)))

    apart = (settings.logits_dtype != dtype) * dtype.itemsize
    in_flight = min(chunk, rows_in_flight(rows, device_type)) * rows * work.itemsize
    chunks = {"logits": chunk * rows * (at_a_time * settings.logits_dtype.itemsize + apart), "rows": in_flight}
    chunks["statistics"] = tokens * (8 * work.itemsize + 4 * _PER_TOKEN)
    gathered = at_a_time * (ranks + 1) * chunk * _STATISTICS * work.itemsize
    hidden_states = 2 * chunk * hidden_size * dtype.itemsize
    gradient = chunk * hidden_size * (wide.itemsize + (wide != dtype) * dtype.itemsize)

    step = product_rows(rows, device_type)
    rounds = wide != dtype  # products before they are added to a wider sum
    products = step * hidden_size * (rounds * dtype.itemsize + wide.itemsize * (tokens > chunk) * rounds)
    sums = {"head_sum": rows * hidden_size * wide.itemsize}
    head_grad = {"head_grad": (wide != dtype) * rows * hidden_size * dtype.itemsize}
    hidden_elements = num_tokens * hidden_size

    if not options.in_backward:
        unrounded_grad = {"hidden_grad": hidden_elements * unrounded(dtype).itemsize}
        collectives = {"collectives": gathered + hidden_states + gradient}
        forward = chunks | {"products": products} | sums | unrounded_grad | collectives
        backward = sums | head_grad | unrounded_grad | {"statistics": 8 * num_tokens * work.itemsize}
        if unrounded(dtype) != dtype:
            backward |= {"hidden_sum": unrounded_grad["hidden_grad"], "hidden_grad": hidden_elements * dtype.itemsize}
        return MemoryPrediction(forward, backward)
    forward = chunks | {"collectives": gathered + hidden_states}
    while_chunks = chunks | {"products": products, "collectives": hidden_states + gradient}
    # The sum is rounded once the chunks are done.
    rest = max(while_chunks, head_grad, key=lambda terms: sum(terms.values()))
    return MemoryPrediction(forward, rest | sums | {"hidden_grad": hidden_elements * dtype.itemsize})
