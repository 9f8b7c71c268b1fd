"""Handlers that read a few words of each token: values at given words, and the largest and smallest logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy import values
from chunked_ce.lazy.answers import log_sum_exp, maths, of_whole, same_for_all_words, values_at
from chunked_ce.lazy.arithmetic import is_over_words, of_softmax
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.form import Form, Words, index_of
from chunked_ce.lazy.logits import Lazy, LazyLogits
from chunked_ce.lazy.product import Rows
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.terms import LOG_PROBABILITIES, TOTAL, Word
from chunked_ce.lazy.together import is_exactly, remember_log_sum_exp, should_be_computed

__all__ = ["of_index", "of_words"]

_FEW = 64  # words whose values are taken

# ---- values at some words ----


@follows("gather")
def _gather(lazy: Lazy, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor | None:
    if not is_over_words(lazy, dim) or isinstance(index, Lazy) or index.dtype != torch.int64:
        return None
    if index.dim() != lazy.dim():  # valid for one token and an index without dimensions; else the logits will raise
        return None
    index = index.movedim(dim, -1)  # (..., k)
    if index.shape[:-1] != lazy._hidden.movedim(lazy._vocab_dim, -1).shape[:-1] or not index.shape[-1]:
        return None
    return _at(lazy, index, dim)


def of_index(lazy: Lazy, items: tuple[Any, ...]) -> Any:
    """The values that an index finds whose last item, of the words, is a number or a tensor of numbers."""
    *tokens, words = items
    if not isinstance(words, Tensor):
        words = torch.tensor(words)
    if words.dtype == torch.bool or words.is_floating_point() or lazy._vocab_dim != lazy.dim() - 1:
        return None
    size = lazy.shape[-1]
    words = words.to(lazy.device, torch.int64)
    words = words.where(words >= 0, words + size)
    places = [item for item in tokens if isinstance(item, Tensor)]
    if not places or not words.dim():
        seen = _of_tokens(lazy, tokens)
        if words.dim() == 1 and len(words) > _FEW and isinstance(seen, Lazy):
            values.check_index(words, size)
            many = of_words(seen, words, lambda x: x[..., words.to(x.device)])
            if many is not None:
                return many
        if not isinstance(seen, Lazy) or seen.is_computed or seen._vocab_dim != seen.dim() - 1:
            return None
        at_words = _at(seen, words.flatten().expand(*seen.shape[:-1], words.numel()), seen.dim() - 1)
        return None if at_words is None else at_words.view((*seen.shape[:-1], *words.shape))
    if any(isinstance(item, slice) for item in tokens):
        return None
    *places, words = torch.broadcast_tensors(*(torch.as_tensor(item).to(lazy.device) for item in tokens), words)
    seen = _of_tokens(lazy, places)
    found = _at(seen, words.unsqueeze(-1), words.dim()) if isinstance(seen, Lazy) else None
    return None if found is None else found.squeeze(-1)


def _of_tokens(lazy: Lazy, tokens: list[Any]) -> Tensor:
    """The logits (..., V) of some tokens."""
    index = (*tokens, slice(None))
    return lazy[index]


def of_words(
    lazy: Lazy,
    words: Words,
    function: Callable[[Tensor], Tensor],  # that takes the words of some tokens
    of_tokens: Callable[[Tensor], Tensor] | None = None,  # that takes the tokens
    vocab_dim: int | None = None,
) -> Any:
    """The lazy logits of some words, which are those of a head that has no others."""
    can = isinstance(lazy, LazyLogits) and not lazy.is_computed and not should_be_computed(lazy) and len(words)
    options = lazy.head.options
    if not can or lazy.head.layout is not None or (options is not None and options.accumulate_into is not None):
        return None
    if lazy.head.vocab is not None and not isinstance(words, range):
        return None
    form = lazy._form if of_tokens is None else lazy._form.map(of_tokens)
    operation = Operation(function, of_tokens=of_tokens, of_rows=lambda rows: rows[..., index_of(words)])
    return lazy.derive(operation, form=form.of_words(words), vocab_dim=vocab_dim)


def _at(lazy: Lazy, index: Tensor, dim: int) -> Tensor | None:
    """The values at words (..., k), which come in place of the vocabulary, dimension ``dim``."""
    if not isinstance(lazy, LazyLogits) or lazy.head.is_sharded:
        if should_be_computed(lazy) and not is_exactly(lazy, LOG_PROBABILITIES):
            return None
        return None if TOTAL in lazy._terms else values_at(lazy, index).movedim(-1, dim)
    if not _can_read(lazy):
        return None
    values.check_index(index, lazy.shape[dim])
    flat = index.reshape(-1, index.shape[-1])  # (N, k)
    logits, _ = _of_rows(lazy, lambda rows, places: (rows.gather(-1, flat[places]), flat[places]))
    return logits.movedim(-1, dim)


@follows("take_along_dim")
def _take_along_dim(lazy: Lazy, indices: Tensor, dim: int | None = None) -> Tensor | None:
    return None if dim is None or isinstance(indices, Lazy) else _gather(lazy, dim, indices)


# ---- predictions ----


def _of_rows(
    lazy: Lazy,
    read: Callable[[Tensor, Rows], tuple[Tensor, Tensor]],
    differentiable: Callable[..., Tensor] = values.selected,
) -> tuple[Tensor, Tensor]:
    """The values and vocabulary entries that ``read(rows, places)`` finds in the rows (m, V) of all tokens.

    The values get the gradient of ``differentiable``, which computes them anew from the entries.
    """

    def of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])  # (N, D)
        found, entries = values.of_rows(lazy.rows(hidden, weight, bias), read, len(hidden))
        if torch.is_grad_enabled():
            factors, formed = maths(lazy, hidden, weight, bias)
            found = values.with_gradient_of(differentiable(*factors, entries, formed), found)
        return found, entries

    # Reshaped out here: engines hang hooks on what a request returns, which a view loses when it is changed in place.
    tokens = lazy._stand_in.select(lazy._vocab_dim, 0).shape
    found, entries = lazy.request(of_rows)
    return found.view((*tokens, *found.shape[1:])), entries.view((*tokens, *entries.shape[1:]))


def _can_read(lazy: Lazy, *, values: bool = True) -> bool:
    """Whether logits can be read a few rows at a time; also their ``values``, which need the bits of all logits."""
    head = lazy.head
    return not lazy._root.call.is_cheap and (not head.is_sharded or (head.has_all_words and not values))


def _best(lazy: Lazy, dim: Any, find: Callable[[Tensor], tuple[Tensor, Tensor]], *, values: bool = True) -> Any:
    """The logits and entries that ``find`` finds in rows (m, V), each with k in the vocabulary's place."""
    if not is_over_words(lazy, dim) or not _can_read(lazy, values=values):
        return None
    if not isinstance(lazy, LazyLogits):
        return _best_of_terms(lazy, find, with_values=values)
    return tuple(found.movedim(-1, dim) for found in _of_rows(lazy, lambda rows, _: find(rows)))


def _best_of_terms(lazy: Lazy, find: Callable[[Tensor], tuple[Tensor, Tensor]], *, with_values: bool) -> Any:
    """The same for what has the order of logits, as their probabilities at some temperature do."""
    form = _form_in_order(lazy)
    if form is None:
        return None

    def entries(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        numbers = lazy._numbers().movedim(lazy._vocab_dim, -1).flatten()
        pieces = lazy._root.product.rows(numbers, weight, bias, hidden.dtype)
        pieces = ((places, form._replace(temperature=None)(rows)) for places, rows in pieces)
        return values.of_rows(pieces, lambda rows, _: find(rows)[1:], len(numbers))[0]

    found = lazy.request(entries)
    found = found.view(*lazy._stand_in.select(lazy._vocab_dim, 0).shape, found.shape[-1])
    kept = values_at(lazy, found) if with_values else found
    return kept.movedim(-1, lazy._vocab_dim), found.movedim(-1, lazy._vocab_dim)


def _form_in_order(lazy: Lazy) -> Form | None:
    """A form of logits that are in the order of a lazy tensor's values."""
    terms = lazy._terms
    if len(terms) == 1 and not terms.tensors:
        ((word, factor),) = terms.items()
        if word in (Word(p=1), Word(p=2)) and factor > 0:
            return lazy._form
    return of_softmax(lazy)


def _entries(lazy: Lazy, dim: Any, keepdim: bool, find: Callable[..., Tensor]) -> Tensor | None:
    """The vocabulary entry that ``find`` finds in each row."""

    def twice(rows: Tensor) -> tuple[Tensor, Tensor]:
        entries = find(rows, -1, keepdim=True)
        return entries, entries

    with torch.no_grad():
        found = _best(lazy, dim, twice, values=False)
    return None if found is None else found[1] if keepdim else found[1].squeeze(dim)


@follows("argmax")
def _argmax(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor | None:
    return _entries(lazy, dim, keepdim, torch.argmax)


@follows("argmin")
def _argmin(lazy: Lazy, dim: int | None = None, keepdim: bool = False) -> Tensor | None:
    return _entries(lazy, dim, keepdim, torch.argmin)


@follows("topk")
def _topk(lazy: Lazy, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not is_over_words(lazy, dim) or not 1 <= k <= lazy.shape[dim]:
        return None
    found = _best(lazy, dim, lambda rows: rows.topk(k, largest=largest, sorted=sorted))
    return None if found is None else torch.return_types.topk(found)


@follows("max")
def _max(lazy: Lazy, dim: Any = None, keepdim: bool = False) -> Any:
    return _extreme(lazy, dim, keepdim, torch.max, torch.return_types.max)


@follows("min")
def _min(lazy: Lazy, dim: Any = None, keepdim: bool = False) -> Any:
    return _extreme(lazy, dim, keepdim, torch.min, torch.return_types.min)


def _extreme(lazy: Lazy, dim: Any, keepdim: bool, function: Callable[..., Any], returned: Callable[..., Any]) -> Any:
    found = _best(lazy, lazy._vocab_dim if dim is None else dim, lambda rows: function(rows, -1, keepdim=True))
    if found is None:
        return found
    if dim is None:
        return function(found[0])
    return returned(found if keepdim else tuple(part.squeeze(dim) for part in found))


@follows("amax")
def _amax(lazy: Lazy, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    found = _extreme(lazy, _only(dim), True, torch.max, tuple)
    return None if found is None else found[0] if keepdim else found[0].squeeze(_only(dim))


@follows("amin")
def _amin(lazy: Lazy, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    found = _extreme(lazy, _only(dim), True, torch.min, tuple)
    return None if found is None else found[0] if keepdim else found[0].squeeze(_only(dim))


def _only(dim: Any) -> Any:
    """The dimension in a sequence of one."""
    return dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim


@follows("logsumexp", torch, Tensor, torch.special)
def _logsumexp(lazy: Lazy, dim: Any, keepdim: bool = False) -> Tensor | None:
    dim = _only(dim)
    if not is_over_words(lazy, dim):
        return None
    if isinstance(lazy, LazyLogits) and _can_read(lazy):
        (found,) = of_whole(lazy, "log-sum-exp with the bits of the logits", _log_sum_exp_of_rows, of_values=True)
    else:
        form = of_softmax(lazy)
        if form is None or should_be_computed(lazy):
            return None
        shift = same_for_all_words(lazy, lazy._terms.shift())
        found = log_sum_exp(lazy, form)
        found = found + shift if isinstance(shift, Tensor) or shift else found
    found = found if keepdim else found.squeeze(dim)
    return remember_log_sum_exp(found, lazy) if isinstance(lazy, LazyLogits) else found


def _log_sum_exp_of_rows(lazy: Lazy) -> tuple[Tensor]:
    """The log-sum-exp of the very logits that other handlers read, with 1 in place of V."""
    differentiable = functools.partial(values.logsumexp, options=lazy.head.options)
    found, _ = _of_rows(lazy, values.logsumexp_and_best, differentiable)
    return (found.unsqueeze(lazy._vocab_dim),)
