"""How the logits that lazy tensors speak of are formed from the product of hidden states and head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.statistics import Logits

__all__ = ["Form", "Words", "index_of"]

Words = range | Tensor  # with step 1, or (n,)


class Form(NamedTuple):
    """Logits ``scale * (product + bias)`` of some words, through a softcap, over a temperature."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (V,) of the words, besides the head's
    temperature: Tensor | None = None  # of each token, in the shape of the logits with 1 in place of V
    words: Words | None = None  # of the head's; None for all of them

    @property
    def logits(self) -> Logits:
        return Logits(self.scale, self.softcap)

    def __call__(self, product: Tensor) -> Tensor:
        """The logits (..., V) of a product with all words of the head."""
        product = product if self.words is None else product[..., index_of(self.words)]
        found = self.logits(product if self.bias is None else product + self.bias)
        return found if self.temperature is None else found / self.temperature

    def map(self, change: Callable[[Tensor], Tensor]) -> Form:
        """The same with a ``change`` of what it has for each token."""
        return self if self.temperature is None else self._replace(temperature=change(self.temperature))

    def of_words(self, words: Words) -> Form:
        """The form of the logits of some of the words, by their numbers among these."""
        bias = None if self.bias is None else self.bias[index_of(words)]
        if isinstance(self.words, range) and isinstance(words, range):
            words = self.words[words.start : words.stop]
        elif self.words is not None:
            words = torch.as_tensor(self.words)[index_of(words)]
        return self._replace(bias=bias, words=words)

    def vocab(self, vocab: VocabShard | None) -> VocabShard | None:
        """This rank's rows among those of the words, given its rows of the head."""
        return vocab if vocab is None or self.words is None else _part_of(vocab, _consecutive(self.words))

    def rows(self, rows: Tensor, vocab: VocabShard | None) -> Tensor:
        """The words' rows of a tensor that has one for each word of the head, or for each of this rank's."""
        if self.words is None:
            return rows
        if vocab is None:
            return rows[index_of(self.words)]
        words = _consecutive(self.words)
        part = _part_of(vocab, words)
        start = part.start + words.start - vocab.start
        return rows[start : start + part.rows]

    def with_bias(self, bias: Tensor | None, vocab: VocabShard | None) -> Tensor | None:
        """The whole bias of the words whose bias in the head is ``bias``, or that of this rank's rows."""
        if self.bias is None:
            return bias
        more = self.bias if vocab is None else self.bias[vocab.start : vocab.stop]
        return more if bias is None else bias + more

    def detached(self) -> Form:
        bias, temperature = (x if x is None else x.detach() for x in (self.bias, self.temperature))
        return self._replace(bias=bias, temperature=temperature)

    def scaled(self, number: float) -> Form | None:
        """The form of ``number`` times the logits; None where that is not finite."""
        scale, softcap = self.scale * number, self.softcap
        if softcap is not None:
            # number * c * tanh(s u / c), with the sign moved inside: tanh is odd.
            softcap = softcap * abs(number)
            if not 0 < softcap < math.inf:
                return None
        return self._replace(scale=scale, softcap=softcap) if math.isfinite(scale) else None

    def is_same(self, other: Form) -> bool:
        mine, its = self.words, other.words
        same = mine is its or (isinstance(mine, range) and mine == its)
        return same and self[:2] == other[:2] and self.bias is other.bias and self.temperature is other.temperature


def index_of(words: Words) -> slice | Tensor:
    return slice(words.start, words.stop) if isinstance(words, range) else words


def _consecutive(words: Words) -> range:
    """The words of a sharded head, of which no others are followed."""
    assert isinstance(words, range)
    return words


@functools.lru_cache(maxsize=64)  # a shard knows whether its ranks have compared their calls
def _part_of(vocab: VocabShard, words: range) -> VocabShard:
    start, stop = (min(max(bound, words.start), words.stop) - words.start for bound in (vocab.start, vocab.stop))
    return dataclasses.replace(vocab, start=start, stop=stop, total=len(words), padded_rows=None)
