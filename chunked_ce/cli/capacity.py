"""The cost of a loss on every rank, by formula: memory, operations, communication, and the largest sizes that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from chunked_ce.cli.memory_models import full_logits
from chunked_ce.cli.planning.run import DTYPES
from chunked_ce.cli.units import bytes_text
from chunked_ce.light import torch
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import KEPT_SHARE, Plan, Settings, predict_memory

__all__ = ["ESTIMATED", "HELD", "TERMS", "RankCost", "Request", "cost_of", "largest"]

WAYS = FULL, FORWARD, BACKWARD, FILTERED = "full logits", "forward way", "backward way", "filtered"

TERMS = {  # by name in the memory law, in the order of the table
    "logits": "logits (of a chunk)",
    "teacher_logits": "the teacher's logits (of a chunk)",
    "rows": "rows in flight, fp32",
    "log_softmax": "log-softmax, fp32",
    "divergence": "terms of the divergence, fp32",
    "loss_grad": "gradient of the log-softmax, fp32",
    "logits_grad": "gradient of the logits",
    "hidden_grad": "dX",
    "hidden_sum": "dX before it is rounded",
    "head_sum": "dW accumulator",
    "head_grad": "dW",
    "products": "products before they are added",
    "head_copy": "head in the products' dtype",
    "hidden_copy": "hidden states in the products' dtype",
    "kept": "kept entries of a filtered chunk",
    "tails": "tails of the filtered entries",
    "packed": "block of the head, packed",
    "statistics": "statistics of the tokens",
    "collectives": "collective buffers",
}
HELD = {"head": "head", "held_grad": "dW kept between micro-batches", "optimizer": "AdamW's state of the head"}
ESTIMATED = (
    "Exact: operations, what is put into the loss's collectives, and the tensors of the chunked ways (the memory law, "
    "tested against measurements). Estimated: what collectives buffer, matrix libraries and allocators keep, full "
    "logits on several ranks (each with its part of the logits), and what the engine holds and sends: AdamW with fp32 "
    "state, ZeRO's partitions without its buckets. The filter's figures are for a trained model of which a chunk keeps "
    f"{KEPT_SHARE:.0%} of the vocabulary entries."
)


@dataclasses.dataclass(frozen=True)
class Request:
    """The head, the tokens and the parallelism to plan for."""

    tokens: int  # N of one micro-batch, over all sequence-parallel ranks
    hidden: int
    vocab: int
    dtype: str = "bf16"
    train_input: bool = True
    train_head: bool = True
    data: int = 1
    sequence: int = 1
    zero: int = 0
    accumulation: int = 1
    chunk: int | None = None
    device: str = "cuda"
    teacher: int | None = None  # hidden size of a teacher's head beside the student's
    ids: int = 0  # per token, of a top-k teacher or of statistics
    adapter: int = 0  # rank of a trained low-rank adapter on the head

    @property
    def ways(self) -> tuple[str, ...]:
        """Those that differ: a filter has no effect on a teacher, on ids or on an adapter."""
        exact = self.teacher is not None or self.ids or self.adapter
        return tuple(way for way in WAYS if way != FILTERED or not exact)

    @property
    def local_tokens(self) -> int:
        return math.ceil(self.tokens / self.sequence)

    @property
    def replicas(self) -> int:
        """Ranks with the same head and different tokens: the head's state is partitioned over them."""
        return self.data * self.sequence


class RankCost(NamedTuple):
    """One way to compute the loss on one tensor-parallel size; bytes per rank."""

    way: str
    tensor_parallel: int
    terms: dict[str, int]  # at the peak
    held: dict[str, int]
    chunk: int | None
    why: str  # the chunk has this size
    operations: int
    communication: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes that the loss takes above what the rank holds."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        return self.peak + sum(self.held.values())


def cost_of(request: Request, way: str, tensor: int) -> RankCost:
    """The cost of one way on ``tensor`` ranks that share the vocabulary."""
    n, rows = request.local_tokens, math.ceil(request.vocab / tensor)
    dtype = DTYPES[request.dtype]
    trained: dict[str, Any] = {"train_input": request.train_input, "train_head": request.train_head}
    if way == FULL:
        with_teacher = request.teacher is not None
        prediction = full_logits(n, rows, request.hidden, dtype=dtype, with_teacher=with_teacher, **trained)
        chunk: int | None = None
        why = ""
    else:
        gradients: dict[str, Any] = {"gradient_filter": "auto"} if way == FILTERED else {"gradients": way.split()[0]}
        prediction = predict_memory(
            n,
            request.vocab,
            request.hidden,
            dtype=dtype,
            options=ChunkOptions(chunk_size=request.chunk or "auto", **gradients),
            device_type=request.device,
            ranks=tensor,
            teacher_hidden_size=request.teacher,
            num_ids=request.ids,
            adapter_rank=request.adapter,
            **trained,
        )
        chunk, why = _chunk(request, way, tensor, rows, dtype)
    phase = prediction.peak_terms
    return RankCost(
        way,
        tensor,
        {name: phase[name] for name in dict.fromkeys([*TERMS, *phase]) if phase.get(name)},
        _held(request, rows, dtype),
        chunk,
        why,
        round(_operations(request, way) * n * rows),
        _communication(request, way, tensor, rows, dtype),
    )


def _chunk(request: Request, way: str, tensor: int, rows: int, dtype: torch.dtype) -> tuple[int, str]:
    """Tokens in a chunk of the loss's forward, and why."""
    n = request.local_tokens
    plan = Plan.by_tokens(
        n,
        n,
        rows,
        request.hidden,
        Settings(
            dtype,
            chunk_size=request.chunk,
            teacher_dtype=None if request.teacher is None else dtype,
            device_type=request.device,
        ),
        head_dtype=dtype if request.train_head and way != BACKWARD else None,
        in_flight=1 if tensor == 1 else 2,
    )
    if way == FILTERED:
        return plan.tokens, "at most; the filter may take fewer"
    if request.chunk:
        return plan.tokens, "as asked"
    together = ", two chunks at a time" if plan.in_flight > 1 else ""
    limit = f"{bytes_text(plan.budget.size)} ({plan.budget.reason}{together})"
    if plan.tokens < n:
        return plan.tokens, f"{math.ceil(n / plan.tokens)} equal chunks with logits of at most {limit}"
    if n * rows * dtype.itemsize * plan.in_flight <= plan.budget.size:
        return n, f"one chunk: all logits keep to {limit}"
    return n, "one chunk: its logits take less than the budget and the fp32 sum of dW over several chunks would"


def _operations(request: Request, way: str) -> float:
    """Operations per token and vocabulary entry: a multiplication and an addition for each element of a product."""
    logits = 2 if way == BACKWARD else 1
    share = KEPT_SHARE if way == FILTERED else 1
    of_head = (logits + share * (request.train_input + request.train_head)) * request.hidden
    of_adapter = (logits + 2 * share) * request.adapter
    return 2 * (of_head + of_adapter + logits * (request.teacher or 0))


def _held(request: Request, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the head and its state, which a rank holds while the loss runs, whatever way it takes."""
    elements, replicas = rows * request.hidden, request.replicas
    held = {"head": elements * dtype.itemsize}
    if request.train_head:
        state = 8 + 4 * (dtype != torch.float32)
        held["optimizer"] = elements * state // (replicas if request.zero >= 1 else 1)
        if request.accumulation > 1:
            held["held_grad"] = elements * dtype.itemsize // (replicas if request.zero >= 2 else 1)
    return held


def _communication(request: Request, way: str, tensor: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a rank puts into collectives: of one call of the loss, and of the engine in one optimizer step."""
    n, d = request.local_tokens, request.hidden
    sent: dict[str, int] = {}
    if tensor > 1:
        sent["row statistics"] = n * 3 * 4
        if request.train_input:
            sent["gradient of the input"] = n * d * (dtype.itemsize if way == FULL else 4)
    if request.replicas > 1:
        weight = rows * d * dtype.itemsize
        if request.train_head:
            sent["gradient of the head, per step"] = weight * (request.accumulation if request.zero >= 2 else 1)
        if request.zero == 3:
            gathers = 2 if way == FULL else 1
            sent["gathering the head, per call"] = gathers * weight // request.replicas
    return sent


def largest(
    request: Request, way: str, tensor: int, name: Literal["tokens", "vocab"], room: Callable[[RankCost], int]
) -> int:
    """The largest ``tokens`` or ``vocab``, all else as asked, for which the peak keeps to ``room``; 0 for none."""

    def fits(value: int) -> bool:
        sized = replace(request, tokens=value) if name == "tokens" else replace(request, vocab=value)
        cost = cost_of(sized, way, tensor)
        return cost.peak <= room(cost)

    if not fits(1):
        return 0
    least, most = 1, 2
    while fits(most) and most < 2**40:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
