"""Scales of lazy logits, and what training code takes from them: losses, log-probabilities, predictions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from chunked_ce.functional import cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.lazy import values
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyLogProbs
from chunked_ce.objective import Logits

__all__ = []

_NOTHING_IGNORED = torch.iinfo(torch.int64).min  # no index of a word, so that -100 is refused as an index is


# ---- scale and softcap ----


@follows("mul multiply __mul__ __rmul__")
def _mul(lazy: Lazy, other: Any) -> Lazy:
    number = _number(other)
    return NotImplemented if number is None else _scale(lazy, number, lambda x: x * number)


@follows("div divide true_divide __truediv__")
def _div(lazy: Lazy, other: Any, *, rounding_mode: str | None = None) -> Lazy:
    number = _number(other)
    if not number or rounding_mode is not None:
        return NotImplemented
    return _scale(lazy, 1 / number, lambda x: x / number)


@follows("neg negative __neg__")
def _neg(lazy: Lazy) -> Lazy:
    return _scale(lazy, -1.0, torch.neg)


@follows("tanh")
def _tanh(lazy: Lazy) -> Lazy:
    if not isinstance(lazy, LazyLogits) or lazy._logits.softcap is not None:
        return NotImplemented
    return lazy.derive(torch.tanh, logits=lazy._logits._replace(softcap=1.0))


@follows("mul_ multiply_ __imul__", Tensor)
def _mul_(lazy: Lazy, other: Any) -> Lazy:
    return _in_place(lazy, _mul(lazy, other))


@follows("div_ divide_ true_divide_ __itruediv__ __idiv__", Tensor)
def _div_(lazy: Lazy, other: Any, *, rounding_mode: str | None = None) -> Lazy:
    return _in_place(lazy, _div(lazy, other, rounding_mode=rounding_mode))


@follows("tanh_")
def _tanh_(lazy: Lazy) -> Lazy:
    return _in_place(lazy, _tanh(lazy))


@follows("neg_ negative_")
def _neg_(lazy: Lazy) -> Lazy:
    return _in_place(lazy, _neg(lazy))


def _number(value: Any) -> float | None:
    """A finite constant, also in a tensor of no dimensions."""
    if isinstance(value, Tensor):
        if isinstance(value, Lazy) or value.dim() or value.requires_grad or value.is_complex() or value.is_meta:
            return None
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _scale(lazy: Lazy, number: float, operation: Any) -> Lazy:
    if not math.isfinite(number):
        return NotImplemented
    if isinstance(lazy, LazyLogProbs):
        factor = lazy._factor * number
        return lazy.derive(operation, factor=factor) if math.isfinite(factor) else NotImplemented
    scale, softcap = lazy._logits
    scale = scale * number
    if softcap is not None:
        # number * c * tanh(s u / c), with the sign moved inside: tanh is odd.
        softcap = softcap * abs(number)
        if not 0 < softcap < math.inf:
            return NotImplemented
    return lazy.derive(operation, logits=Logits(scale, softcap)) if math.isfinite(scale) else NotImplemented


def _in_place(lazy: Lazy, result: Lazy) -> Lazy:
    """``lazy`` turned into ``result``, where no other tensor shares the logits that would change."""
    if result is NotImplemented or not lazy.become(result):
        return NotImplemented
    return lazy


# ---- losses ----


@follows("cross_entropy", F, computed=True)
def _cross_entropy(
    input: Lazy,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    class_dim = min(1, input.dim() - 1)
    if not isinstance(input, LazyLogits) or input._vocab_dim != class_dim:
        return NotImplemented
    if isinstance(target, Lazy) or not isinstance(target, Tensor) or target.is_floating_point():
        return NotImplemented  # probabilities of classes
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    keywords = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
    return _loss(input, target, label_smoothing, keywords)


@follows("nll_loss", F)
def _nll_loss(
    input: Lazy,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    class_dim = min(1, input.dim() - 1)
    if not isinstance(input, LazyLogProbs) or input._factor != 1 or input._vocab_dim != class_dim:
        return NotImplemented
    if isinstance(target, Lazy):
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return _loss(input, target, 0.0, {"weight": weight, "reduction": reduction, "ignore_index": ignore_index})


def _loss(lazy: Lazy, target: Tensor, label_smoothing: float, keywords: dict[str, Any]) -> Tensor:
    head = lazy.head
    keywords |= head.keywords_of_loss(label_smoothing)
    if lazy.is_computed:
        del keywords["options"]
        if lazy._value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return NotImplemented
        return cross_entropy(lazy.materialize().movedim(lazy._vocab_dim, -1), target, **keywords)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, softcap = lazy._logits
        maths = {"linear_bias": bias, "softcap": softcap, "logit_scale": scale, "vocab": head.vocab}
        return linear_cross_entropy(hidden, weight, target, **maths, **keywords)

    return lazy.request(loss)


# ---- log-probabilities ----


def _is_vocab(lazy: Lazy, dim: Any) -> bool:
    return isinstance(dim, int) and -lazy.dim() <= dim < lazy.dim() and dim % lazy.dim() == lazy._vocab_dim


@follows("log_softmax", Tensor, torch)
def _log_softmax(input: Lazy, dim: int, dtype: torch.dtype | None = None) -> Lazy:
    if not isinstance(input, LazyLogits) or not _is_vocab(input, dim):
        return NotImplemented
    raised = input if dtype is None else input.to(dtype)
    if not isinstance(raised, LazyLogits) or raised.is_computed:
        return NotImplemented
    return raised.derive(lambda x: x.log_softmax(dim), cls=LazyLogProbs)


@follows("log_softmax", F)
def _f_log_softmax(input: Lazy, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Lazy:
    return NotImplemented if dim is None else _log_softmax(input, dim, dtype)


@follows("gather")
def _gather(lazy: Lazy, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    if not _is_vocab(lazy, dim) or isinstance(index, Lazy) or index.dtype != torch.int64:
        return NotImplemented
    index = index.movedim(dim, -1)  # (..., k)
    if index.shape[:-1] != lazy._hidden.movedim(lazy._vocab_dim, -1).shape[:-1]:
        return NotImplemented
    if isinstance(lazy, LazyLogProbs):
        return NotImplemented if index.shape[-1] != 1 else _logprobs(lazy, index.squeeze(-1)).unsqueeze(dim)
    lazy.head.check_can_compute("gather")

    def chosen(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = values.selected(hidden.flatten(0, -2), weight, bias, lazy._logits, index.reshape(-1, index.shape[-1]))
        return found.view(index.shape)

    return lazy.request(chosen).to(lazy.dtype).movedim(-1, dim)


@follows("take_along_dim")
def _take_along_dim(lazy: Lazy, indices: Tensor, dim: int | None = None) -> Tensor:
    return NotImplemented if dim is None or isinstance(indices, Lazy) else _gather(lazy, dim, indices)


def _logprobs(lazy: LazyLogProbs, index: Tensor) -> Tensor:
    head = lazy.head

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, softcap = lazy._logits
        maths = {"linear_bias": bias, "softcap": softcap, "logit_scale": scale, "vocab": head.vocab}
        found = linear_logprobs(hidden, weight, index, ignore_index=_NOTHING_IGNORED, options=head.options, **maths)
        return found if lazy._factor == 1 else found * lazy._factor

    return lazy.request(logprobs)


@follows("sum")
def _sum(lazy: Lazy, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of the log-probabilities over the vocabulary, which label smoothing takes."""
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not isinstance(lazy, LazyLogProbs) or not _is_vocab(lazy, dim):
        return NotImplemented
    head = lazy.head

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, softcap = lazy._logits
        maths = {"linear_bias": bias, "softcap": softcap, "logit_scale": scale, "vocab": head.vocab}
        target = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        # Smoothed all the way, the loss is the mean of -log p over the words.
        mean = linear_cross_entropy(
            hidden, weight, target, reduction="none", label_smoothing=1.0, options=head.options, **maths
        )
        return mean * (-lazy._factor * lazy.shape[lazy._vocab_dim])

    found = lazy.request(total)
    found = found.unsqueeze(dim) if keepdim else found
    return found if dtype is None else found.to(dtype)


# ---- predictions ----


def _best(lazy: Lazy, dim: Any, k: int, *, largest: bool, name: str) -> Tensor:
    """The indices of the largest or smallest logits, (..., k) with k in the vocabulary's place."""
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim) or not 1 <= k <= lazy.shape[dim]:
        return NotImplemented
    lazy.head.check_can_compute(name)

    def best(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = values.topk(flat, weight, bias, lazy._logits, lazy.head.options, k, largest)
        return found.view(*hidden.shape[:-1], k)

    with torch.no_grad():
        return lazy.request(best).movedim(-1, dim)


@follows("argmax")
def _argmax(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    found = _best(lazy, dim, 1, largest=True, name="argmax")
    return found if found is NotImplemented or keepdim else found.squeeze(dim)


@follows("argmin")
def _argmin(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    found = _best(lazy, dim, 1, largest=False, name="argmin")
    return found if found is NotImplemented or keepdim else found.squeeze(dim)


@follows("topk")
def _topk(lazy: Lazy, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    indices = _best(lazy, dim, k, largest=largest, name="topk")
    return indices if indices is NotImplemented else torch.return_types.topk((_gather(lazy, dim, indices), indices))


@follows("max")
def _max(lazy: Lazy, dim: Any = None, keepdim: bool = False) -> Any:
    indices = _best(lazy, dim, 1, largest=True, name="max")
    if indices is NotImplemented:
        return indices
    found = _gather(lazy, dim, indices)
    return torch.return_types.max((found, indices) if keepdim else (found.squeeze(dim), indices.squeeze(dim)))


@follows("logsumexp", torch, Tensor, torch.special)
def _logsumexp(lazy: Lazy, dim: Any, keepdim: bool = False) -> Tensor:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim):
        return NotImplemented
    lazy.head.check_can_compute("logsumexp")

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return values.logsumexp(flat, weight, bias, lazy._logits, lazy.head.options).view(hidden.shape[:-1])

    found = lazy.request(total)
    return found.unsqueeze(dim) if keepdim else found
