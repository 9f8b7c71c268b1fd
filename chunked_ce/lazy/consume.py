"""Scales of lazy logits, and what training code takes from them: losses, log-probabilities, predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from chunked_ce.functional import cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.lazy import values
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyLogProbs
from chunked_ce.lazy.product import Rows
from chunked_ce.lazy.source import Operation
from chunked_ce.objective import Logits

__all__ = []

_NOTHING_IGNORED = torch.iinfo(torch.int64).min  # no index of a word, so that -100 is refused as an index is


# ---- scale and softcap ----


@follows("mul multiply __mul__ __rmul__")
def _mul(lazy: Lazy, other: Any) -> Lazy:
    number = _number(other)
    return NotImplemented if number is None else _scale(lazy, number, lambda x: x * _operand(number, x))


@follows("div divide true_divide __truediv__")
def _div(lazy: Lazy, other: Any, *, rounding_mode: str | None = None) -> Lazy:
    number = _number(other)
    if not number or rounding_mode is not None:
        return NotImplemented
    return _scale(lazy, 1 / number, lambda x: x / _operand(number, x))


@follows("neg negative __neg__")
def _neg(lazy: Lazy) -> Lazy:
    return _scale(lazy, -1.0, torch.neg)


@follows("tanh")
def _tanh(lazy: Lazy) -> Lazy:
    if not isinstance(lazy, LazyLogits) or lazy._logits.softcap is not None:
        return NotImplemented
    return lazy.derive(Operation(torch.tanh, of_rows=torch.tanh), logits=lazy._logits._replace(softcap=1.0))


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


def _operand(number: float, x: Tensor) -> float | Tensor:
    """A stand-in meets a stand-in: with a number, its strides in dimensions of size 1 are not those of the values."""
    return x.new_empty(()) if x.is_meta else number


def _scale(lazy: Lazy, number: float, operation: Any) -> Lazy:
    if not math.isfinite(number):
        return NotImplemented
    scaled = Operation(operation, of_rows=operation)
    if isinstance(lazy, LazyLogProbs):
        factor = lazy._factor * number
        return lazy.derive(scaled, factor=factor) if math.isfinite(factor) else NotImplemented
    scale, softcap = lazy._logits
    scale = scale * number
    if softcap is not None:
        # number * c * tanh(s u / c), with the sign moved inside: tanh is odd.
        softcap = softcap * abs(number)
        if not 0 < softcap < math.inf:
            return NotImplemented
    return lazy.derive(scaled, logits=Logits(scale, softcap)) if math.isfinite(scale) else NotImplemented


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


@follows("log_softmax", Tensor, torch, torch.special)
def _log_softmax(input: Lazy, dim: int, dtype: torch.dtype | None = None) -> Lazy:
    if not isinstance(input, LazyLogits) or not _is_vocab(input, dim):
        return NotImplemented
    raised = input if dtype is None else input.to(dtype)
    if not isinstance(raised, LazyLogits) or raised.is_computed:
        return NotImplemented
    dtype = _dtype_of_log_softmax(raised) if dtype is None else dtype

    def of_logits(x: Tensor) -> Tensor:
        # Always contiguous, which the function of a stand-in is not in dimensions of size 1.
        return torch.empty(x.shape, dtype=dtype, device="meta") if x.is_meta else x.log_softmax(dim, dtype=dtype)

    operation = Operation(of_logits, of_rows=lambda x: x.log_softmax(-1, dtype=dtype))
    return raised.derive(operation, cls=LazyLogProbs)


def _dtype_of_log_softmax(lazy: Lazy) -> torch.dtype:
    """What autocast makes of it, which differs from device to device and does nothing to a stand-in."""
    if not torch.is_autocast_enabled(lazy.device.type):
        return lazy.dtype
    return torch.zeros(1, dtype=lazy.dtype, device=lazy.device).log_softmax(-1).dtype


@follows("log_softmax", F)
def _f_log_softmax(input: Lazy, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Lazy:
    return NotImplemented if dim is None else _log_softmax(input, dim, dtype)


@follows("gather")
def _gather(lazy: Lazy, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    if not _is_vocab(lazy, dim) or isinstance(index, Lazy) or index.dtype != torch.int64:
        return NotImplemented
    if index.dim() != lazy.dim():  # the logits take one of no dimensions where they have one, or raise
        return NotImplemented
    index = index.movedim(dim, -1)  # (..., k)
    if index.shape[:-1] != lazy._hidden.movedim(lazy._vocab_dim, -1).shape[:-1]:
        return NotImplemented
    if isinstance(lazy, LazyLogProbs):
        return NotImplemented if index.shape[-1] != 1 else _logprobs(lazy, index.squeeze(-1)).unsqueeze(dim)
    if lazy._root.call.is_cheap:
        return NotImplemented
    lazy.head.check_can_compute("gather")
    values.check_index(index, lazy.shape[dim])
    flat = index.reshape(-1, index.shape[-1])  # (N, k)
    found, _ = _found(lazy, lambda rows, places: (rows.gather(-1, flat[places]), flat[places]))
    return found.movedim(-1, dim)


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

Read = Callable[[Tensor, Rows], tuple[Tensor, Tensor]]


def _found(lazy: LazyLogits, read: Read) -> tuple[Tensor, Tensor]:
    """``read(rows, places)``, a logit or several (m, k) of each row (m, V) and their words, for all rows: (..., k)."""

    def found(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = _flat(hidden)
        logits, words = values.of_rows(lazy.rows(hidden, weight, bias), read, len(hidden))
        if torch.is_grad_enabled():
            same = values.selected(hidden, weight, bias, lazy._logits, words)
            logits = values.with_gradient_of(same, logits)
        return logits, words

    tokens = lazy._stand_in.select(lazy._vocab_dim, 0).shape
    return tuple(part.view(*tokens, part.shape[-1]) for part in lazy.request(found))


def _flat(hidden: Tensor) -> Tensor:
    """Hidden states (..., D) as (N, D)."""
    return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])


def _best(lazy: Lazy, dim: Any, name: str, find: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    """The logits and words that ``find`` finds in rows (m, V), each with k in the vocabulary's place."""
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim) or lazy._root.call.is_cheap:
        return NotImplemented
    lazy.head.check_can_compute(name)
    return tuple(found.movedim(-1, dim) for found in _found(lazy, lambda rows, _: find(rows)))


def _words(lazy: Lazy, dim: Any, keepdim: bool, name: str, find: Callable[..., Tensor]) -> Tensor:
    """The word of each row that ``find`` finds."""

    def with_logit(rows: Tensor) -> tuple[Tensor, Tensor]:
        words = find(rows, -1, keepdim=True)
        return words, words

    with torch.no_grad():
        found = _best(lazy, dim, name, with_logit)
    return found if found is NotImplemented else found[1] if keepdim else found[1].squeeze(dim)


@follows("argmax")
def _argmax(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _words(lazy, dim, keepdim, "argmax", torch.argmax)


@follows("argmin")
def _argmin(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _words(lazy, dim, keepdim, "argmin", torch.argmin)


@follows("topk")
def _topk(lazy: Lazy, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _is_vocab(lazy, dim) or not 1 <= k <= lazy.shape[dim]:
        return NotImplemented
    found = _best(lazy, dim, "topk", lambda rows: rows.topk(k, largest=largest, sorted=sorted))
    return found if found is NotImplemented else torch.return_types.topk(found)


@follows("max")
def _max(lazy: Lazy, dim: Any = None, keepdim: bool = False) -> Any:
    found = _best(lazy, dim, "max", lambda rows: rows.max(-1, keepdim=True))
    if found is NotImplemented:
        return found
    return torch.return_types.max(found if keepdim else tuple(part.squeeze(dim) for part in found))


@follows("logsumexp", torch, Tensor, torch.special)
def _logsumexp(lazy: Lazy, dim: Any, keepdim: bool = False) -> Tensor:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim) or lazy._root.call.is_cheap:
        return NotImplemented
    lazy.head.check_can_compute("logsumexp")

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden = _flat(hidden)
        found, best = values.of_rows(lazy.rows(hidden, weight, bias), values.logsumexp_and_best, len(hidden))
        if torch.is_grad_enabled():
            same = values.logsumexp(hidden, weight, bias, lazy._logits, lazy.head.options, best)
            found = values.with_gradient_of(same, found)
        return found

    # Engines hang hooks on what a request returns, which a view would lose when it is changed in place.
    found = lazy.request(total).view(lazy._stand_in.select(lazy._vocab_dim, 0).shape)
    return found.unsqueeze(dim) if keepdim else found
