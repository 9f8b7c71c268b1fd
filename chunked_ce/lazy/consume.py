"""Handlers of losses, and of sums over words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from chunked_ce.functional import cross_entropy, linear_cross_entropy
from chunked_ce.lazy.answers import maths, word_total
from chunked_ce.lazy.arithmetic import log_softmax, of_softmax
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy
from chunked_ce.lazy.soft_targets import times_tensor
from chunked_ce.lazy.terms import LOG_PROBABILITIES
from chunked_ce.lazy.together import is_exactly, should_be_computed

__all__: list[str] = []

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
) -> Tensor | None:
    if isinstance(target, Tensor) and target.is_floating_point() and not input.is_computed:
        plain = (weight, size_average, reduce, label_smoothing) == (None, None, None, 0.0)
        return _of_class_probabilities(input, target, reduction) if plain else None
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    keywords = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
    return _loss(input, target, label_smoothing, (size_average, reduce), keywords)


def _of_class_probabilities(input: Lazy, target: Tensor, reduction: str) -> Tensor | None:
    """The cross-entropy with soft labels, of the shape of the logits."""
    terms = input._root.call.terms
    if input._vocab_dim != min(1, input.dim() - 1) or terms or reduction not in ("none", "sum", "mean"):
        return None
    logprobs = log_softmax(input, input._vocab_dim)
    products = None if logprobs is None else times_tensor(logprobs, target)
    if products is None:
        return products
    losses = -products.sum(input._vocab_dim)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


@follows("nll_loss", F)
def _nll_loss(
    input: Lazy,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    if not is_exactly(input, LOG_PROBABILITIES):
        return None
    keywords = {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
    return _loss(input, target, 0.0, (size_average, reduce), keywords)


def _loss(
    lazy: Lazy,
    target: Tensor,
    label_smoothing: float,
    legacy: tuple[bool | None, bool | None],  # size_average and reduce, which override the reduction
    keywords: dict[str, Any],
) -> Tensor | None:
    if isinstance(target, Lazy) or lazy._vocab_dim != min(1, lazy.dim() - 1):
        return None
    if legacy != (None, None):
        keywords["reduction"] = _reduction.legacy_get_string(*legacy)
    keywords |= lazy._root.call.keywords_of_loss(label_smoothing)
    if lazy.is_computed:
        del keywords["options"]
        values = lazy.materialize()
        if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return None
        found: Tensor = cross_entropy(values.movedim(lazy._vocab_dim, -1), target, **keywords)
        return found

    form = of_softmax(lazy)
    if form is None:
        return None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (hidden, weight), formed = maths(lazy, hidden, weight, bias, form)
        of_tokens: Tensor = linear_cross_entropy(hidden, weight, target, **(formed | keywords))
        return of_tokens

    result: Tensor = lazy.request(loss)
    return result


# ---- sums over words ----


def _dims(dim: Any, dims: int) -> tuple[int, ...] | None:
    """All dimensions that a reduction names, counted from the front."""
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(dims))
    named = dim if isinstance(dim, tuple | list) else (dim,)
    if not all(isinstance(one, int) and -dims <= one < dims for one in named):
        return None
    return tuple(one % dims for one in named)


def _reduced(
    lazy: Lazy, dim: Any, keepdim: bool, dtype: torch.dtype | None, reduce: Callable[..., Tensor]
) -> Tensor | None:
    """``reduce``, of totals over words, for the dimensions that are asked for."""
    dims = _dims(dim, lazy.dim())
    if dims is None or lazy._vocab_dim not in dims or len(set(dims)) < len(dims) or should_be_computed(lazy):
        return None
    found = reduce(word_total(lazy), dims, keepdim=keepdim)
    return found if dtype is None else found.to(dtype)


@follows("sum")
def _sum(lazy: Lazy, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor | None:
    return _reduced(lazy, dim, keepdim, dtype, torch.sum)


@follows("nansum")
def _nansum(lazy: Lazy, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor | None:
    return _reduced(lazy, dim, keepdim, dtype, torch.nansum)  # a token has no number at all, or only numbers


@follows("mean")
def _mean(lazy: Lazy, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor | None:
    size = lazy.shape[lazy._vocab_dim]
    return _reduced(lazy, dim, keepdim, dtype, lambda totals, dims, keepdim: (totals / size).mean(dims, keepdim))
