"""The product of hidden states and head behind lazy logits, whose bits are the same at every computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

from chunked_ce import plan
from chunked_ce.options import ChunkOptions

__all__ = ["Product", "Rows", "rows_per_block", "unsafe_view", "with_gradient", "with_layout"]

Rows = slice | Tensor
unsafe_view = torch.ops.aten._unsafe_view.default  # not a view to autograd, so that it can be changed in place


class Product:
    """``hidden @ weight.T + bias`` of one call of a head, recomputed whenever rows of it are needed.

    A matrix product may round a row differently when other rows stand beside it. Every row is therefore computed in the
    same block of rows each time: the largest logits of a chunk are then among the logits that are computed later.
    ``linear`` computes a block.
    """

    def __init__(
        self,
        hidden: Tensor,
        rows_per_block: int,
        autocast: torch.dtype | None,
        linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.hidden, self.linear = hidden.detach(), linear  # (..., D)
        self.num_rows = hidden.shape[:-1].numel()
        self.rows_per_block, self.autocast = rows_per_block, autocast

    @overload
    def factor(self, tensor: Tensor) -> Tensor: ...
    @overload
    def factor(self, tensor: Tensor | None) -> Tensor | None: ...
    def factor(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` in the dtype of the product."""
        return tensor if tensor is None or self.autocast is None else tensor.to(self.autocast)

    @torch.no_grad()
    def rows(
        self, numbers: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Iterator[tuple[Rows, Tensor]]:
        """The rows with these ``numbers``, (n,) on the CPU, in pieces: their places among the n, and values (m, V).

        ``dtype`` is that of the hidden states when they reach the head, which engines may change.
        """
        hidden = self.factor(self.hidden.to(dtype))
        weight, bias = self.factor(weight), self.factor(bias)  # not detached: torch chooses the kernel by it
        order: Tensor | None = None  # in which the rows come, if it is not theirs
        if not torch.equal(numbers, torch.arange(self.num_rows)):
            numbers, order = numbers.sort(stable=True)
        if not len(numbers):
            yield slice(0, 0), self.linear(hidden.reshape(-1, hidden.shape[-1])[:0], weight, bias)
        starts = range(0, self.num_rows, max(1, self.rows_per_block))
        ends = torch.searchsorted(numbers, torch.tensor([*starts, self.num_rows])).tolist()
        for start, first, last in zip(starts, ends, ends[1:], strict=False):
            if first == last:
                continue
            block = self._block(hidden, start, weight, bias)
            if order is None:
                yield slice(first, last), block
            else:
                kept = (numbers[first:last] - start).to(block.device)
                yield order[first:last].to(block.device), block.index_select(0, kept)

    def whole(self, numbers: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """These rows in one tensor, (n, V)."""
        found: Tensor | None = None
        for places, block in self.rows(numbers, weight, bias, dtype):
            if len(block) == len(numbers) and isinstance(places, slice):
                return block
            found = block.new_empty(len(numbers), block.shape[-1]) if found is None else found
            found[places] = block
        assert found is not None  # one block comes even of no rows
        return found

    def _block(self, hidden: Tensor, start: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.num_rows <= self.rows_per_block:  # in the shape of the call, with the bits of the layer itself
            found = self.linear(hidden, weight, bias)
            block: Tensor = unsafe_view(found, (self.num_rows, found.shape[-1]))
            return block
        rows = slice(start, start + self.rows_per_block)
        return self.linear(hidden.reshape(self.num_rows, hidden.shape[-1])[rows], weight, bias)


def rows_per_block(
    num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, options: ChunkOptions, device_type: str
) -> int:
    """The number of rows of logits that are computed at a time."""
    settings = plan.Settings.of(options, dtype, device_type)
    return plan.tokens_per_chunk(num_rows, vocab_size, hidden_size, settings)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Callable[[], Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # (n, V)  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight = ctx.saved_tensors
        _, needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            None,
            grad @ weight if needs_hidden else None,
            grad.T @ hidden if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def with_gradient(values: Callable[[], Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``values()`` (n, V), with the gradient of the product of ``hidden`` (n, D) and the head."""
    found: Tensor = _WithGradient.apply(values, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _WithLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
        memory = values.new_empty(offset + last + 1 if values.numel() else 0)
        # Not `as_strided`: a view could not be changed in place.
        out = memory.new_empty(0).set_(memory.untyped_storage(), offset, values.shape, strides)
        return out.copy_(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, None


def with_layout(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with the strides and the offset of ``like``, copied where they differ."""
    if values.stride() == like.stride() and values.storage_offset() == like.storage_offset():
        return values
    found: Tensor = _WithLayout.apply(values, like.stride(), like.storage_offset())  # type: ignore[no-untyped-call]
    return found
