"""What is asked of logits besides losses, some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import plan
from chunked_ce.functional import linear_logprobs
from chunked_ce.objective import Logits
from chunked_ce.options import ChunkOptions

__all__ = ["logits_of", "logsumexp", "selected", "topk"]

_GATHERED_ELEMENTS = 2**22  # elements of head rows gathered at a time


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits) -> Tensor:
    """The logits (..., V) themselves."""
    return logits(F.linear(hidden, weight, bias))


@torch.no_grad()
def topk(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    logits: Logits,
    options: ChunkOptions | None,
    k: int,
    largest: bool = True,
) -> Tensor:
    """The indices (N, k) of the largest logits, sorted; the first of equals for k = 1."""
    found = torch.empty(len(hidden), k, dtype=torch.long, device=hidden.device)
    for rows in _blocks(hidden, weight, options):
        block = logits_of(hidden[rows], weight, bias, logits)
        if k == 1:
            found[rows] = (block.argmax if largest else block.argmin)(-1, keepdim=True)
        else:
            found[rows] = block.topk(k, largest=largest, sorted=True).indices
    return found


def selected(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    logits: Logits,
    index: Tensor,  # (N, k)
) -> Tensor:
    """The logits (N, k) of some words for each token, differentiable, in the products' dtype."""
    on_cpu = index.device.type == "cpu"  # a device asserts by itself, and the host need not wait
    if on_cpu and index.numel() and not (int(index.amin()) >= 0 and int(index.amax()) < len(weight)):
        raise IndexError(f"index must be in [0, {len(weight)}), held {int(index.amin())} to {int(index.amax())}")
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        product = _Selected.apply(hidden.to(dtype), weight, bias, index)
        return logits(product)


class _Selected(torch.autograd.Function):
    """``(hidden[i] * weight[index[i]]).sum(-1)``, gathering few rows of the head at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, index):
        ctx.save_for_backward(hidden, weight, index)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        work = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(index.shape, dtype=hidden.dtype, device=hidden.device)
        for rows in _gathers(index, weight):
            words = weight[index[rows]].to(hidden.dtype)  # (n, k, D)
            product = torch.einsum("nd,nkd->nk", hidden[rows].to(work), words.to(work))
            found[rows] = product if bias is None else product + bias[index[rows]].to(hidden.dtype)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # (N, k)
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


def logsumexp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    logits: Logits,
    options: ChunkOptions | None,
) -> Tensor:
    """The log-sum-exp (N,) of each token's logits, differentiable, in float32 (float64)."""
    # log_prob = z - lse of any word gives it; the largest logit is close to it, so that little cancels.
    best = topk(hidden, weight, bias, logits, options, 1)
    keywords = {"linear_bias": bias, "softcap": logits.softcap, "logit_scale": logits.scale, "options": options}
    logprob = linear_logprobs(hidden, weight, best.squeeze(-1), **keywords)
    return selected(hidden, weight, bias, logits, best).squeeze(-1).to(logprob.dtype) - logprob


def _blocks(hidden: Tensor, weight: Tensor, options: ChunkOptions | None) -> Iterator[slice]:
    options = options or ChunkOptions()
    size = plan.tokens_per_chunk(
        len(hidden),
        *weight.shape,
        compute_dtype=hidden.dtype,
        chunk_size=None if options.chunk_size == "auto" else options.chunk_size,
        memory_budget=options.memory_budget,
    )
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _gathers(index: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, _GATHERED_ELEMENTS // max(1, index.shape[-1] * weight.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(index), size))
