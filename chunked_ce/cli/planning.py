"""What a loss takes on every rank, by formula: memory, operations, communication, and the largest sizes that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from chunked_ce import ChunkOptions
from chunked_ce import plan as law
from chunked_ce.cli.contestants import DTYPES
from chunked_ce.cli.laws import filter_covered, full_logits
from chunked_ce.cli.report import bytes_text

__all__ = ["ESTIMATED", "TERMS", "Plan", "Request", "plan_of", "ways"]

FULL, FORWARD, BACKWARD, FILTERED = "full logits", "forward way", "backward way", "filtered"

TERMS = {  # by name in the law, in the order of the table
    "logits": "logits (of a chunk)",
    "rows": "rows in flight, fp32",
    "log_softmax": "log-softmax, fp32",
    "loss_grad": "gradient of the log-softmax, fp32",
    "logits_grad": "gradient of the logits",
    "hidden_grad": "dX",
    "hidden_sum": "dX before it is rounded",
    "head_sum": "dW accumulator",
    "head_grad": "dW",
    "products": "products before they are added",
    "head_copy": "head in the products' dtype",
    "hidden_copy": "hidden states in the products' dtype",
    "kept": "kept words of a filtered chunk",
    "tails": "tails of the filtered words",
    "packed": "block of the head, packed",
    "statistics": "statistics of the tokens",
    "collectives": "collective buffers",
}
HELD = {"head": "head", "held_grad": "dW kept between micro-batches", "optimizer": "AdamW's state of the head"}
KEPT_SHARE = 0.08  # as the memory law has it
ESTIMATED = (
    "Exact: operations, what is put into the loss's collectives, and the tensors of the chunked ways (the memory law, "
    "tested against measurements). Estimated: what collectives buffer, matrix libraries and allocators keep, full "
    "logits on several ranks (each with its part of the logits), and what the engine holds and sends: AdamW with fp32 "
    "state, ZeRO's partitions without its buckets. The filter's figures are for a trained model of which a chunk keeps "
    f"{KEPT_SHARE:.0%} of the words."
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for."""

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

    @property
    def local_tokens(self) -> int:
        return math.ceil(self.tokens / self.sequence)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same head and other tokens: its state is partitioned over them."""
        return self.data * self.sequence


class Plan(NamedTuple):
    """One way on one tensor-parallel size; bytes, per rank."""

    way: str
    tensor: int
    terms: dict[str, int]  # at the peak
    held: dict[str, int]
    chunk: int | None
    why: str
    operations: int
    communication: dict[str, int]

    @property
    def peak(self) -> int:
        """What the loss takes above what is there already."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        return self.peak + sum(self.held.values())


def ways() -> dict[str, str | None]:
    """The ways there are, and why one is left out."""
    missing = None if filter_covered() else "the memory law does not cover it"
    return {FULL: None, FORWARD: None, BACKWARD: None, FILTERED: missing}


def plan_of(request: Request, way: str, tensor: int) -> Plan:
    """One way on ``tensor`` ranks that share the vocabulary."""
    n, words = request.local_tokens, math.ceil(request.vocab / tensor)
    dtype = DTYPES[request.dtype]
    trained = {"train_input": request.train_input, "train_head": request.train_head}
    if way == FULL:
        found = full_logits(n, words, request.hidden, dtype=dtype, **trained)
        chunk, why = None, ""
    else:
        found = law.predict_memory(
            n,
            request.vocab,
            request.hidden,
            dtype=dtype,
            options=_options(request, way),
            device_type=request.device,
            ranks=tensor,
            **trained,
        )
        chunk, why = _chunk(request, way, tensor, dtype)
    phase = max(found, key=lambda terms: sum(terms.values()))
    terms = {name: phase[name] for name in TERMS if phase.get(name)}
    return Plan(
        way,
        tensor,
        terms | {name: size for name, size in phase.items() if size and name not in TERMS},
        _held(request, words, dtype),
        chunk,
        why,
        round(_operations(request, way) * n * words * request.hidden),
        _communication(request, way, tensor, words, dtype),
    )


def _options(request: Request, way: str) -> ChunkOptions:
    if way == FILTERED:
        return ChunkOptions(chunk_size=request.chunk or "auto", gradient_filter="auto")
    return ChunkOptions(chunk_size=request.chunk or "auto", gradients=way.split()[0])


def _chunk(request: Request, way: str, tensor: int, dtype: torch.dtype) -> tuple[int, str]:
    """Tokens in a chunk of the loss's forward, and why."""
    n, words = request.local_tokens, math.ceil(request.vocab / tensor)
    sums_head = request.train_head and way != BACKWARD
    chunk = law.tokens_per_chunk(
        n,
        words,
        request.hidden,
        compute_dtype=dtype,
        head_dtype=dtype if sums_head else None,
        chunk_size=request.chunk,
        in_flight=1 if tensor == 1 else 2,
    )
    if way == FILTERED:
        return chunk, "at most; the filter may take fewer"
    if request.chunk:
        return chunk, "as asked"
    least, by_head = 64 * 2**20, 8 * words * request.hidden // 3
    budget = max(least, by_head) if sums_head else least
    of = "two thirds of an fp32 gradient of the head" if sums_head and by_head > least else "the least budget"
    together = "" if tensor == 1 else ", two chunks at a time"
    if chunk < n:
        parts = math.ceil(n / chunk)
        return chunk, f"{parts} equal chunks with logits of at most {bytes_text(budget)} ({of}{together})"
    if n * words * dtype.itemsize * (1 if tensor == 1 else 2) <= budget:
        return n, f"one chunk: all logits keep to {bytes_text(budget)} ({of}{together})"
    return n, "one chunk: its logits take less than the budget and the fp32 sum of dW over several chunks would"


def _operations(request: Request, way: str) -> float:
    """Operations per token, word and hidden size: two for each product's multiplication and addition."""
    logits = 2 if way == BACKWARD else 1
    share = KEPT_SHARE if way == FILTERED else 1
    return 2 * (logits + share * (request.train_input + request.train_head))


def _held(request: Request, words: int, dtype: torch.dtype) -> dict[str, int]:
    """What is there while the loss runs, whatever way it takes."""
    elements, replicas = words * request.hidden, request.replicas
    held = {"head": elements * dtype.itemsize}
    if request.train_head:
        state = 8 + 4 * (dtype != torch.float32)
        held["optimizer"] = elements * state // (replicas if request.zero >= 1 else 1)
        if request.accumulation > 1:
            held["held_grad"] = elements * dtype.itemsize // (replicas if request.zero >= 2 else 1)
    return held


def _communication(request: Request, way: str, tensor: int, words: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a rank puts into collectives: of one call of the loss, and of the engine in one optimizer step."""
    n, d = request.local_tokens, request.hidden
    found = {}
    if tensor > 1:
        found["row statistics"] = n * 3 * 4
        if request.train_input:
            width = dtype.itemsize if way == FULL else 4
            found["gradient of the input"] = n * d * width
    if request.replicas > 1:
        weight = words * d * dtype.itemsize
        if request.train_head:
            found["gradient of the head, per step"] = weight * (request.accumulation if request.zero >= 2 else 1)
        if request.zero == 3:
            gathers = 2 if way == FULL else 1
            found["gathering the head, per call"] = gathers * weight // request.replicas
    return found


def largest(request: Request, way: str, tensor: int, name: str, room: Callable[[Plan], int]) -> int:
    """The largest ``tokens`` or ``vocab``, all else as asked, for which the peak keeps to ``room``; 0 for none."""

    def fits(value: int) -> bool:
        found = plan_of(dataclasses.replace(request, **{name: value}), way, tensor)
        return found.peak <= room(found)

    if not fits(1):
        return 0
    least, most = 1, 2
    while fits(most) and most < 2**40:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
