"""The statistics of tokens that answer for the values of lazy tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from chunked_ce.functional import linear_logprobs, linear_statistics
from chunked_ce.known_tokens import remember
from chunked_ce.lazy.form import Form
from chunked_ce.lazy.logits import Lazy
from chunked_ce.lazy.terms import ONE, Factor, Terms, at_words, sum_over_words
from chunked_ce.lazy.together import known_log_sum_exp

__all__ = ["log_sum_exp", "maths", "of_whole", "same_for_all_words", "statistics", "values_at", "word_total"]

_NOTHING_IGNORED = torch.iinfo(torch.int64).min  # never an index, so that -100 is refused as any wrong index is


def maths(
    lazy: Lazy, hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form | None = None
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The hidden states (..., D), the weight and the keywords by which a loss forms the logits of a lazy tensor."""
    form, whole = lazy._form if form is None else form, lazy.head.vocab
    vocab = form.vocab(whole)
    keywords: dict[str, Any] = {
        "linear_bias": form.with_bias(None if bias is None else form.rows(bias, whole), vocab),
        "softcap": form.softcap,
        "logit_scale": form.scale,
        "vocab": vocab,
    }
    weight = form.rows(weight, whole)
    if form.temperature is not None:
        keywords["temperature"] = form.temperature.movedim(lazy._vocab_dim, -1).squeeze(-1)
    low_rank_weight = lazy._root.call.low_rank_weight
    if low_rank_weight is None:
        return (hidden, weight), keywords
    width = lazy.head.in_features
    adapter = {"linear_adapter": (hidden[..., width:], form.rows(low_rank_weight, whole))}
    return (hidden[..., :width], weight), keywords | adapter


def statistics(lazy: Lazy, names: tuple[str, ...], form: Form | None = None) -> tuple[Tensor, ...]:
    """Statistics of the tokens by the ``names`` of `chunked_ce.linear_statistics`, with 1 in place of V."""

    form = lazy._form if form is None else form

    def of(lazy: Lazy) -> tuple[Tensor, ...]:
        def ask(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            target = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
            remember(target, -100, None)
            factors, keywords = maths(lazy, hidden, weight, bias, form)
            found = linear_statistics(*factors, target, outputs=names, options=lazy.head.options, **keywords)
            return tuple(getattr(found, name) for name in names)

        return tuple(found.unsqueeze(lazy._vocab_dim) for found in lazy.request(ask))

    if form.temperature is not None or form.bias is not None or isinstance(form.words, Tensor):
        return of(lazy)
    return of_whole(lazy, (names, form), of)


def of_whole(
    lazy: Lazy, key: Hashable, compute: Callable[[Lazy], tuple[Tensor, ...]], *, of_values: bool = False
) -> tuple[Tensor, ...]:
    """What ``compute`` gives for a lazy tensor, with 1 in place of V; once for all pieces of a whole, by ``key``.

    With ``of_values`` it depends on all that was done to the logits, not on their form alone.
    """
    if lazy._piece is None or lazy._joined:
        return compute(lazy)
    whole, operations = lazy._piece
    is_changed = of_values and operations is not lazy._operations
    if is_changed or whole.is_computed or whole.requires_grad != lazy.requires_grad:
        return compute(lazy)
    whole.join_graph()
    key = (key, whole.requires_grad and torch.is_grad_enabled())
    if key not in whole._answers:
        whole._answers[key] = compute(whole)
    of_tokens = operations[-1].of_tokens
    assert of_tokens is not None  # a cut of the tokens
    return tuple(map(of_tokens, whole._answers[key]))


def log_sum_exp(lazy: Lazy, form: Form | None = None) -> Tensor:
    """The log-sum-exp of the logits of ``form``, with 1 in place of V."""
    return statistics(lazy, ("lse",), form)[0]


def same_for_all_words(lazy: Lazy, terms: Terms) -> Factor:
    """The value of terms that have no probabilities, with 1 in place of V."""
    found = terms.get(ONE, 0.0)
    powers = {word.lse: factor for word, factor in terms.items() if word.lse}
    if powers:
        lse = log_sum_exp(lazy)
        for power, factor in powers.items():
            found = found + factor * lse**power
    return found


def word_total(lazy: Lazy) -> Tensor:
    """The sum over the vocabulary, with 1 in its place."""

    def ask(names: tuple[str, ...]) -> tuple[Tensor, ...]:
        lse = known_log_sum_exp(lazy) if "lse" in names else None
        if lse is None:
            return statistics(lazy, names)
        # The caller may take the sum from it, and then its gradient cancels before it is rounded to the head's dtype.
        others = tuple(name for name in names if name != "lse")
        found = dict(zip(others, statistics(lazy, others) if others else (), strict=True))
        return tuple(found.get(name, lse) for name in names)

    return sum_over_words(lazy._terms, lazy.shape[lazy._vocab_dim], ask)


def values_at(lazy: Lazy, ids: Tensor) -> Tensor:
    """The values at K words of each token, (..., K) for ids (..., K)."""
    names = ("logprob", "lse") if any(word.lse for word in lazy._terms) else ("logprob",)
    has_one = ids.shape[-1] == 1

    def ask(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        factors, keywords = maths(lazy, hidden, weight, bias)
        keywords |= {"ignore_index": _NOTHING_IGNORED, "options": lazy.head.options}
        if names == ("logprob",) and has_one:
            logprobs: Tensor = linear_logprobs(*factors, ids.squeeze(-1), **keywords)
            return (logprobs,)
        found = linear_statistics(*factors, ids.squeeze(-1) if has_one else ids, outputs=names, **keywords)
        return tuple(getattr(found, name) for name in names)

    logprob, *rest = lazy.request(ask)
    logprob = logprob.unsqueeze(-1) if has_one else logprob
    terms = lazy._terms.map(lambda factor: factor.movedim(lazy._vocab_dim, -1))
    return at_words(terms, logprob, rest[0].unsqueeze(-1) if rest else None)
