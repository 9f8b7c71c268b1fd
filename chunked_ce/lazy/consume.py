"""Handlers of scales, and of what training code computes from logits: losses, log-probabilities, predictions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.utils.weak import WeakTensorKeyDictionary

from chunked_ce import devices
from chunked_ce.functional import cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.known_tokens import remember
from chunked_ce.lazy import values
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyLogProbs
from chunked_ce.lazy.source import Operation, version
from chunked_ce.rows.statistics import Logits

__all__ = []

_ZEROS = WeakTensorKeyDictionary()  # the version of a tensor, and whether it was 0 then
_NOTHING_IGNORED = torch.iinfo(torch.int64).min  # never an index, so that -100 is refused as any wrong index is


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


@follows("add __add__ __radd__")
def _add_nothing(lazy: Lazy, other: Any, *, alpha: float = 1) -> Lazy:
    """The sum with one zero for each word, as the ``final_logits_bias`` of BART and its kin is."""
    if not isinstance(lazy, LazyLogits) or type(other) is not Tensor or lazy._vocab_dim != lazy.dim() - 1 or alpha != 1:
        return NotImplemented
    is_of_words = other.dim() <= lazy.dim() and other.shape[-1:] == lazy.shape[-1:] == (other.numel(),)
    if not is_of_words or other.is_meta or other.requires_grad or not other.is_floating_point() or not _is_zero(other):
        return NotImplemented
    other = other.clone()
    return lazy.derive(Operation(lambda x: x + other.to(x.device), of_rows=lambda x: x + other.flatten()))


def _is_zero(tensor: Tensor) -> bool:
    """Whether all values are 0, asked once: the host waits for an accelerator's answer."""
    then, is_zero = _ZEROS.get(tensor, (None, False))
    if then is None or then != version(tensor):
        if devices.captures(tensor.device):  # where nobody may wait
            return False
        is_zero = not tensor.any()
        _ZEROS[tensor] = version(tensor), is_zero
    return is_zero


def _number(value: Any) -> float | None:
    """A finite constant, which may come in a tensor without dimensions."""
    if isinstance(value, Tensor):
        if isinstance(value, Lazy) or value.dim() or value.requires_grad or value.is_complex() or value.is_meta:
            return None
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _operand(number: float, x: Tensor) -> float | Tensor:
    """The factor for ``x``: a stand-in times a number would get other strides in dimensions of size 1."""
    return x.new_empty(()) if x.is_meta else number


def _scale(lazy: Lazy, number: float, operation: Callable[[Tensor], Tensor]) -> Lazy:
    """``number`` times a lazy tensor, which ``operation`` computes."""
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


def _in_place(handler: Callable[..., Lazy]) -> Callable[..., Lazy]:
    """The same in place, where no other tensor shares the logits that would change."""

    @functools.wraps(handler)
    def change(lazy: Lazy, *args: Any, **kwargs: Any) -> Lazy:
        result = handler(lazy, *args, **kwargs)
        return lazy if result is not NotImplemented and lazy.become(result) else NotImplemented

    return change


follows("mul_ multiply_ __imul__", Tensor)(_in_place(_mul))
follows("div_ divide_ true_divide_ __itruediv__ __idiv__", Tensor)(_in_place(_div))
follows("tanh_")(_in_place(_tanh))
follows("neg_ negative_")(_in_place(_neg))


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
    if not isinstance(input, LazyLogits) or not isinstance(target, Tensor) or target.is_floating_point():
        return NotImplemented  # class probabilities among others
    keywords = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
    return _loss(input, target, label_smoothing, (size_average, reduce), keywords)


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
    if not isinstance(input, LazyLogProbs) or input._factor != 1:
        return NotImplemented
    keywords = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
    return _loss(input, target, 0.0, (size_average, reduce), keywords)


def _loss(
    lazy: Lazy,
    target: Tensor,
    label_smoothing: float,
    legacy: tuple[bool | None, bool | None],  # size_average and reduce, which override the reduction
    keywords: dict[str, Any],
) -> Tensor:
    if isinstance(target, Lazy) or lazy._vocab_dim != min(1, lazy.dim() - 1):
        return NotImplemented
    if legacy != (None, None):
        keywords["reduction"] = _reduction.legacy_get_string(*legacy)
    keywords |= lazy.head.keywords_of_loss(label_smoothing)
    if lazy.is_computed:
        del keywords["options"]
        if lazy._value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return NotImplemented
        return cross_entropy(lazy.materialize().movedim(lazy._vocab_dim, -1), target, **keywords)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden, maths = _maths(lazy, hidden, bias)
        return linear_cross_entropy(hidden, weight, target, **maths, **keywords)

    return lazy.request(loss)


def _maths(lazy: Lazy, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states (..., D) and the keywords by which a loss forms the logits of a lazy tensor."""
    scale, softcap = lazy._logits
    keywords = {"linear_bias": bias, "softcap": softcap, "logit_scale": scale, "vocab": lazy.head.vocab}
    low_rank_weight = lazy._root.call.low_rank_weight
    if low_rank_weight is None:
        return hidden, keywords
    width = lazy.head.in_features
    return hidden[..., :width], keywords | {"linear_adapter": (hidden[..., width:], low_rank_weight)}


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
        # The values are always contiguous, but torch gives a stand-in other strides in dimensions of size 1.
        return torch.empty(x.shape, dtype=dtype, device="meta") if x.is_meta else x.log_softmax(dim, dtype=dtype)

    operation = Operation(of_logits, of_rows=lambda x: x.log_softmax(-1, dtype=dtype))
    return raised.derive(operation, cls=LazyLogProbs)


def _dtype_of_log_softmax(lazy: Lazy) -> torch.dtype:
    """The dtype under autocast, which differs between devices and is not applied to a stand-in."""
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
    if index.dim() != lazy.dim():  # valid for one token and an index without dimensions; else the logits will raise
        return NotImplemented
    index = index.movedim(dim, -1)  # (..., k)
    if index.shape[:-1] != lazy._hidden.movedim(lazy._vocab_dim, -1).shape[:-1]:
        return NotImplemented
    if isinstance(lazy, LazyLogProbs):
        return NotImplemented if index.shape[-1] != 1 else _logprobs(lazy, index.squeeze(-1)).unsqueeze(dim)
    if not _can_read(lazy):
        return NotImplemented
    values.check_index(index, lazy.shape[dim])
    flat = index.reshape(-1, index.shape[-1])  # (N, k)
    logits, _ = _of_rows(lazy, lambda rows, places: (rows.gather(-1, flat[places]), flat[places]))
    return logits.movedim(-1, dim)


@follows("take_along_dim")
def _take_along_dim(lazy: Lazy, indices: Tensor, dim: int | None = None) -> Tensor:
    return NotImplemented if dim is None or isinstance(indices, Lazy) else _gather(lazy, dim, indices)


def _logprobs(lazy: LazyLogProbs, index: Tensor) -> Tensor:
    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden, maths = _maths(lazy, hidden, bias)
        keywords = {"ignore_index": _NOTHING_IGNORED, "options": lazy.head.options}
        found = linear_logprobs(hidden, weight, index, **maths, **keywords)
        return found if lazy._factor == 1 else found * lazy._factor

    return lazy.request(logprobs)


@follows("sum")
def _sum(lazy: Lazy, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of the log-probabilities over the vocabulary, from which code for label smoothing starts."""
    dim = _only(dim)
    if not isinstance(lazy, LazyLogProbs) or not _is_vocab(lazy, dim):
        return NotImplemented

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        target = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        remember(target, -100, None)
        # With a label smoothing of 1 the loss is the mean of -log p over the vocabulary.
        hidden, maths = _maths(lazy, hidden, bias)
        keywords = {"reduction": "none", "label_smoothing": 1.0, "options": lazy.head.options}
        return linear_cross_entropy(hidden, weight, target, **maths, **keywords) * (-lazy._factor * lazy.shape[dim])

    found = lazy.request(total)
    found = found.unsqueeze(dim) if keepdim else found
    return found if dtype is None else found.to(dtype)


def _only(dim: Any) -> Any:
    """The dimension in a sequence of one."""
    return dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim


# ---- predictions ----


def _of_rows(
    lazy: LazyLogits, read: Callable, differentiable: Callable[..., Tensor] = values.selected
) -> tuple[Tensor, Tensor]:
    """The values and vocabulary entries that ``read(rows, places)`` finds in the rows (m, V) of all tokens.

    The values get the gradient of ``differentiable``, which computes them anew from the entries.
    """

    def of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])  # (N, D)
        found, entries = values.of_rows(lazy.rows(hidden, weight, bias), read, len(hidden))
        if torch.is_grad_enabled():
            found = values.with_gradient_of(differentiable(hidden, weight, bias, lazy._logits, entries), found)
        return found, entries

    # Reshaped out here: engines hang hooks on what a request returns, which a view loses when it is changed in place.
    tokens = lazy._stand_in.select(lazy._vocab_dim, 0).shape
    return tuple(part.view((*tokens, *part.shape[1:])) for part in lazy.request(of_rows))


def _can_read(lazy: Lazy, *, values: bool = True) -> bool:
    """Whether logits can be read a few rows at a time; also their ``values``, which need the bits of all logits."""
    head = lazy.head
    return not lazy._root.call.is_cheap and (not head.is_sharded or (head.has_all_words and not values))


def _best(lazy: Lazy, dim: Any, find: Callable[[Tensor], tuple[Tensor, Tensor]], *, values: bool = True) -> Any:
    """The logits and entries that ``find`` finds in rows (m, V), each with k in the vocabulary's place."""
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim) or not _can_read(lazy, values=values):
        return NotImplemented
    return tuple(found.movedim(-1, dim) for found in _of_rows(lazy, lambda rows, _: find(rows)))


def _entries(lazy: Lazy, dim: Any, keepdim: bool, find: Callable[..., Tensor]) -> Tensor:
    """The vocabulary entry that ``find`` finds in each row."""

    def twice(rows: Tensor) -> tuple[Tensor, Tensor]:
        entries = find(rows, -1, keepdim=True)
        return entries, entries

    with torch.no_grad():
        found = _best(lazy, dim, twice, values=False)
    return found if found is NotImplemented else found[1] if keepdim else found[1].squeeze(dim)


@follows("argmax")
def _argmax(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _entries(lazy, dim, keepdim, torch.argmax)


@follows("argmin")
def _argmin(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _entries(lazy, dim, keepdim, torch.argmin)


@follows("topk")
def _topk(lazy: Lazy, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _is_vocab(lazy, dim) or not 1 <= k <= lazy.shape[dim]:
        return NotImplemented
    found = _best(lazy, dim, lambda rows: rows.topk(k, largest=largest, sorted=sorted))
    return found if found is NotImplemented else torch.return_types.topk(found)


@follows("max")
def _max(lazy: Lazy, dim: Any = None, keepdim: bool = False) -> Any:
    found = _best(lazy, dim, lambda rows: rows.max(-1, keepdim=True))
    if found is NotImplemented:
        return found
    return torch.return_types.max(found if keepdim else tuple(part.squeeze(dim) for part in found))


@follows("logsumexp", torch, Tensor, torch.special)
def _logsumexp(lazy: Lazy, dim: Any, keepdim: bool = False) -> Tensor:
    dim = _only(dim)
    if not isinstance(lazy, LazyLogits) or not _is_vocab(lazy, dim) or not _can_read(lazy):
        return NotImplemented

    differentiable = functools.partial(values.logsumexp, options=lazy.head.options)
    found, _ = _of_rows(lazy, values.logsumexp_and_best, differentiable)
    return found.unsqueeze(dim) if keepdim else found
