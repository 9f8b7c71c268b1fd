"""Values read from logits, such as the largest ones, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from chunked_ce.functional import linear_statistics
from chunked_ce.lazy.product import Rows
from chunked_ce.options import ChunkOptions
from chunked_ce.rows.statistics import Logits

__all__ = ["check_index", "logsumexp", "logsumexp_and_best", "of_rows", "selected", "with_gradient_of"]

_GATHERED_ELEMENTS = 2**22  # elements of head rows gathered at a time


@torch.no_grad()
def of_rows(
    pieces: Iterator[tuple[Rows, Tensor]],  # places and rows of logits (m, V)
    read: Callable[[Tensor, Rows], tuple[Tensor, ...]],
    num_rows: int,
) -> tuple[Tensor, ...]:
    """The results of ``read`` for all pieces, put together: (N, ...)."""
    found: tuple[Tensor, ...] = ()
    for places, rows in pieces:
        parts = read(rows, places)
        found = found or tuple(part.new_empty(num_rows, *part.shape[1:]) for part in parts)
        for whole, part in zip(found, parts, strict=True):
            whole[places] = part
    return found


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def with_gradient_of(differentiable: Tensor, values: Tensor) -> Tensor:
    """``values`` with the gradient of ``differentiable``, which is equal but for its rounding."""
    found: Tensor = _WithGradientOf.apply(differentiable.to(values.dtype), values)  # type: ignore[no-untyped-call]
    return found


def check_index(index: Tensor, vocab_size: int) -> None:
    if index.device.type != "cpu" or not index.numel():  # a device asserts it without making the host wait
        return
    least, most = (int(bound) for bound in index.aminmax())
    if least < 0 or most >= vocab_size:
        raise IndexError(f"index must be in [0, {vocab_size}), held {least} to {most}")


def selected(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    index: Tensor,  # (N, k)
    maths: dict[str, Any],  # the keywords by which losses form logits
) -> Tensor:
    """The logits (N, k) of k vocabulary entries for each token, differentiable, in the products' dtype."""
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    apply: Callable[..., Tensor] = _Selected.apply
    with torch.autocast(hidden.device.type, enabled=False):
        product = apply(hidden.to(dtype), weight, maths["linear_bias"], index)
        if "linear_adapter" in maths:
            low_rank_hidden, low_rank_weight = maths["linear_adapter"]
            product = product + apply(low_rank_hidden.to(dtype), low_rank_weight, None, index)
        return Logits(maths["logit_scale"], maths["softcap"])(product)


class _Selected(torch.autograd.Function):
    """``(hidden[i] * weight[index[i]]).sum(-1)``, gathering a few rows of the head at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, index)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        work = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(index.shape, dtype=hidden.dtype, device=hidden.device)
        for rows in _gathers(index, weight):
            entries = weight[index[rows]].to(hidden.dtype)  # (n, k, D)
            product = torch.einsum("nd,nkd->nk", hidden[rows].to(work), entries.to(work))
            found[rows] = product if bias is None else product + bias[index[rows]].to(hidden.dtype)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # (N, k)  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, index = ctx.saved_tensors
        work = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=work) if ctx.needs_input_grad[1] else None
        grad_bias = None
        for rows in _gathers(index, weight):
            part = grad[rows].to(work)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.einsum("nk,nkd->nd", part, weight[index[rows]].to(work)).to(hidden.dtype)
            if grad_weight is not None:
                outer = part.unsqueeze(-1) * hidden[rows].to(work).unsqueeze(1)  # (n, k, D)
                grad_weight.index_add_(0, index[rows].flatten(), outer.flatten(0, 1))
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            grad_bias = torch.zeros(shape, dtype=work, device=grad.device)
            grad_bias = grad_bias.index_add_(0, index.flatten(), grad.flatten().to(work)).to(dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None


def logsumexp_and_best(rows: Tensor, places: Rows) -> tuple[Tensor, Tensor]:
    """The log-sum-exp (m,) of rows (m, V) in float32 (float64), and the entries (m, 1) with their largest logits."""
    best = rows.argmax(-1, keepdim=True)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).logsumexp(-1), best


def logsumexp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    entries: Tensor,  # (N, 1), any of the vocabulary
    maths: dict[str, Any],
    options: ChunkOptions | None,
) -> Tensor:
    """The log-sum-exp (N,) of each token's logits, differentiable, in float32 (float64)."""
    found = linear_statistics(hidden, weight, entries.squeeze(-1), outputs=("lse",), options=options, **maths).lse
    assert found is not None  # it was asked for
    return found


def _gathers(index: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, _GATHERED_ELEMENTS // max(1, index.shape[-1] * weight.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(index), size))
