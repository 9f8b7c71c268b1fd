"""Sums of products of probabilities and log-probabilities, which a few statistics of each token answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, overload

import torch
from torch import Tensor

__all__ = [
    "LOGITS",
    "LOG_PROBABILITIES",
    "ONE",
    "PROBABILITIES",
    "TOTAL",
    "Factor",
    "Terms",
    "Word",
    "at_words",
    "sum_over_words",
]

Factor = float | Tensor  # a tensor has a number for each token, in the shape of the logits with 1 in place of V


class Word(NamedTuple):
    """A product of powers: of a word's probability p, of log p, and of the log-sum-exp of all logits.

    With ``total`` it is something else, of which only the sum over all words is known: its factor.
    """

    p: int = 0
    logp: int = 0
    lse: int = 0
    total: int = 0

    @property
    def can_be_summed(self) -> bool:
        return (self.p, self.logp, self.total) in _SUMS


ONE, TOTAL, _P, _LOGP, _LSE = Word(), Word(total=1), Word(p=1), Word(logp=1), Word(lse=1)


class Terms(dict[Word, Factor]):
    """A sum of factors times words.

    >>> z = LOGITS
    >>> PROBABILITIES.times(z).plus(PROBABILITIES.scaled(2.0))
    {Word(p=1, logp=1, lse=0, total=0): 1.0, Word(p=1, logp=0, lse=1, total=0): 1.0, Word(p=1, ...): 2.0}
    """

    @property
    def tensors(self) -> list[Tensor]:
        return [factor for factor in self.values() if isinstance(factor, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """The same with a ``change`` of every factor that is a tensor."""
        return Terms((word, change(f) if isinstance(f, Tensor) else f) for word, f in self.items())

    def scaled(self, factor: Factor) -> Terms:
        return Terms((word, _product(factor, mine)) for word, mine in self.items())

    def plus(self, other: Terms) -> Terms:
        found = Terms(self)
        for word, factor in other.items():
            total = found.pop(word) + factor if word in found else factor
            if isinstance(total, Tensor) or total:
                found[word] = total
        return found

    def times(self, other: Terms) -> Terms | None:
        """The product; None where no statistic answers it."""
        found = Terms()
        for a, mine in self.items():
            for b, factor in other.items():
                word = Word(*map(sum, zip(a, b, strict=True)))
                if not word.can_be_summed:
                    return None
                found = found.plus(Terms({word: _product(mine, factor)}))
        return found

    def slope(self) -> Factor | None:
        """The factor of the logits if these terms are the logits times it, plus what is the same for all words."""
        if any(word.p or word.total or (word.logp and word.lse) for word in self):
            return None
        return self.get(_LOGP)

    def shift(self) -> Terms:
        """These terms, which have a `slope`, less the logits times it."""
        slope = self.slope()
        assert slope is not None
        found = Terms((word, factor) for word, factor in self.items() if word != _LOGP)
        if found.get(_LSE) is slope or (isinstance(slope, float) and _is_number(found.get(_LSE), slope)):
            del found[_LSE]
            return found
        return found.plus(Terms({_LSE: -slope}))

    @property
    def power(self) -> tuple[int, Terms] | None:
        """The power of p, and the logarithm of a factor of each token, if these terms are the log of their product."""
        slope = self.slope()
        if not isinstance(slope, float) or slope not in (1.0, 2.0):
            return None
        return int(slope), Terms((word, f) for word, f in self.items() if word != _LOGP)

    def of(self, logits: Tensor) -> Tensor:
        """Their values (..., V) for these logits (..., V); factors have 1 in place of V."""
        if TOTAL in self:
            raise RuntimeError(
                "a gradient of a divergence's words is never formed: take the sum over words before what needs it"
            )
        if not self.tensors and self == LOGITS:
            return logits
        lse = logits.logsumexp(-1, keepdim=True)
        return at_words(self, logits - lse, lse)


LOGITS = Terms({_LOGP: 1.0, _LSE: 1.0})
LOG_PROBABILITIES = Terms({_LOGP: 1.0})
PROBABILITIES = Terms({_P: 1.0})


def _is_number(factor: Factor | None, number: float) -> bool:
    return isinstance(factor, float) and factor == number


@overload
def _product(a: Tensor, b: Factor) -> Tensor: ...
@overload
def _product(a: Factor, b: Tensor) -> Tensor: ...
@overload
def _product(a: Factor, b: Factor) -> Factor: ...
def _product(a: Factor, b: Factor) -> Factor:
    """``a * b``, without a copy where one of them is 1."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float) and one == 1:
            return other
    return a * b


def at_words(terms: Terms, logprob: Tensor, lse: Tensor | None) -> Tensor:
    """The values at some words (..., K), given their log-probabilities (..., K) and, if they need it, lse (..., 1)."""
    found: Factor = 0.0
    for word, factor in terms.items():
        value = torch.exp(word.p * logprob) if word.p else None
        for power, base in ((word.logp, logprob), (word.lse, lse)):
            for _ in range(power):
                assert base is not None
                value = base if value is None else value * base
        found = found + (factor if value is None else _product(factor, value))
    return found.expand_as(logprob) if isinstance(found, Tensor) else torch.full_like(logprob, found)


class _Sum(NamedTuple):
    """The sum of a product over all words: ``number * statistic``, less ``number * lse`` if ``less_lse``."""

    statistic: str | None
    number: Callable[[int], float]  # of V
    less_lse: bool = False


_SUMS = {
    (0, 0, 0): _Sum(None, float),
    (1, 0, 0): _Sum(None, lambda _: 1.0),
    (0, 1, 0): _Sum("mean_logit", float, less_lse=True),
    (1, 1, 0): _Sum("entropy", lambda _: -1.0),
    (2, 0, 0): _Sum("log_sum_sq_probs", lambda _: 1.0),
    (0, 0, 1): _Sum(None, lambda _: 1.0),
}


def sum_over_words(terms: Terms, vocab_size: int, ask: Callable[[tuple[str, ...]], tuple[Tensor, ...]]) -> Tensor:
    """The sum over the vocabulary (..., 1), from statistics (..., 1) that ``ask`` gives for their names.

    Factors of the same statistic are added first: what cancels there has no part in the rounding.
    """
    factors: dict[tuple[str | None, int], Factor] = {}

    def add(statistic: str | None, lse: int, factor: Factor) -> None:
        at = (statistic, lse)
        factors[at] = factors[at] + factor if at in factors else factor

    for word, factor in terms.items():
        statistic, number, less_lse = _SUMS[word.p, word.logp, word.total]
        add(statistic, word.lse, _product(factor, number(vocab_size)))
        if less_lse:
            add(None, word.lse + 1, _product(factor, -number(vocab_size)))
    factors = {at: f for at, f in factors.items() if isinstance(f, Tensor) or f}
    names = tuple(dict.fromkeys(name for name, _ in factors if name is not None))
    if terms.keys() == {TOTAL}:
        total_of_words = factors[None, 0]
        assert isinstance(total_of_words, Tensor)  # mixtures, whose total is no tensor, have handlers of their own
        return total_of_words
    if not names or any(lse for _, lse in factors):
        names = (*names, "lse")  # also where nothing is asked, so that the sum is part of the graph
    found = dict(zip(names, ask(names), strict=True))
    if "log_sum_sq_probs" in found:
        found["log_sum_sq_probs"] = found["log_sum_sq_probs"].exp()
    total: Tensor | None = None
    for (name, power), factor in factors.items():
        values = [found[one] for one in ([] if name is None else [name]) + ["lse"] * power]
        value = math.prod(values[1:], start=values[0]) if values else torch.ones_like(found[names[0]])
        value = _product(factor, value)
        total = value if total is None else total + value
    if total is None:
        total = torch.zeros_like(found[names[0]])
    return total if total.requires_grad else total + 0 * found[names[0]]
