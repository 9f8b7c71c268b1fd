"""Looking up rows of an embedding that are spread over ranks with different tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunked_ce.parallel.collectives import Collectives, Pending
from chunked_ce.parallel.meeting import Doing, meet
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.tracing import not_compiled

__all__ = ["lookup"]

_BUDGET = 64 * 2**20  # bytes of rows, of all ranks' tokens, in a collective
_NOTHING = -0.0  # 0 would turn a -0 into 0 where it is added
_NO_ID = -1  # of the padding behind a rank's tokens
_BAD_IDS = -1  # as a number of tokens: the rank could not take part


@not_compiled
def lookup(rows: Tensor, ids: Tensor, vocab: VocabShard, padding_idx: int | None = None) -> Tensor:
    """The embeddings (..., D) of this rank's ``ids`` (...), of which every rank holds some ``rows`` (V_r, D).

    Numbers of tokens may differ between ranks and may be 0. The gradient of ``rows`` is the sum over all ranks' tokens,
    formed in fp32, divided by the number of ranks. The values are those of a plain lookup, bit for bit.

    Raises:
        IndexError: an id is outside [0, vocab.total); on the CPU on every rank, else as a device-side assertion.
    """
    flat = ids.reshape(-1).long()
    found: Tensor = _Lookup.apply(rows, flat, vocab, padding_idx)  # type: ignore[no-untyped-call]
    return found.view(*ids.shape, rows.shape[-1])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, vocab: VocabShard, padding_idx: int | None) -> Tensor:
        collectives = Collectives(vocab.group.group_name)
        everyones = _gathered_ids(ids, vocab, collectives)  # (R, n)
        found = rows.new_empty(everyones.shape[1], rows.shape[-1])
        travelling: tuple[slice, Pending] | None = None
        for tokens in _chunks(everyones, rows):
            values = _own_values(rows, everyones[:, tokens].flatten(), vocab.start)
            started = tokens, collectives.reduce_scatter(values, "chunked_ce: embeddings of tokens")
            if travelling is not None:
                found[travelling[0]] = travelling[1].wait()
            travelling = started
        if travelling is not None:
            found[travelling[0]] = travelling[1].wait()
        ctx.save_for_backward(everyones, rows)
        ctx.vocab, ctx.padding_idx, ctx.collectives = vocab, padding_idx, collectives
        return found[: len(ids)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        everyones, rows = ctx.saved_tensors
        start, size = ctx.vocab.start, ctx.collectives.size
        accumulate = torch.promote_types(rows.dtype, torch.float32)
        padded = grad.new_zeros(everyones.shape[1], grad.shape[-1])
        padded[: len(grad)] = grad
        total = torch.zeros(rows.shape, dtype=accumulate, device=rows.device)
        for tokens in _chunks(everyones, rows):
            part = ctx.collectives.all_gather(padded[tokens], "chunked_ce: gradients of embeddings").wait()
            places = everyones[:, tokens].flatten() - start
            held = (places >= 0) & (places < len(rows))
            if ctx.padding_idx is not None:
                held &= places != ctx.padding_idx - start
            total.index_add_(0, places[held], part.flatten(0, 1)[held].to(accumulate))
        return total.div_(size).to(rows.dtype), None, None, None


def _gathered_ids(ids: Tensor, vocab: VocabShard, collectives: Collectives) -> Tensor:
    """Every rank's ids (R, n), padded behind the shorter ones."""
    fits = (ids >= 0) & (ids < vocab.total)
    error = None
    if ids.device.type != "cpu":
        torch._assert_async(fits.all(), "an id of an embedding is outside [0, V)")  # pyright: ignore[reportPrivateImportUsage]
    elif not fits.all():
        worst = ids[~fits][0].item()
        error = IndexError(f"input of the embedding must be in [0, {vocab.total}), held {worst}")
    number = len(ids) if error is None else _BAD_IDS
    doing = Doing("the lookup of embeddings", {"total": vocab.total})
    numbers = [number for number, *_ in meet(collectives, doing, number, device=ids.device)]
    if error is not None:
        raise error
    if _BAD_IDS in numbers:
        raise IndexError(f"input of the embedding is not in [0, {vocab.total}) on rank {numbers.index(_BAD_IDS)}")
    padded = ids.new_full((max(numbers),), _NO_ID)
    padded[: len(ids)] = ids
    return collectives.all_gather(padded, "chunked_ce: ids of tokens").wait()


def _chunks(everyones: Tensor, rows: Tensor) -> Iterator[slice]:
    """Slices of the ranks' tokens, the same on every rank."""
    ranks, number = everyones.shape
    at_a_time = max(1, _BUDGET // max(1, ranks * rows.shape[-1] * rows.element_size()))
    for start in range(0, number, at_a_time):
        yield slice(start, min(start + at_a_time, number))


def _own_values(rows: Tensor, ids: Tensor, start: int) -> Tensor:
    """The values (N, D) of ids whose rows are here, and for others what changes no value when it is added."""
    places = ids - start
    away = (places < 0) | (places >= len(rows))
    if len(rows) == 0:
        return rows.new_full((len(ids), rows.shape[-1]), _NOTHING)
    values = rows.detach().index_select(0, places.clamp_(0, len(rows) - 1))
    return values.masked_fill_(away.unsqueeze(-1), _NOTHING)
