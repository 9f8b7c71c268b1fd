"""What lazy tensors have in common with one another, and with the plain tensors that they meet."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.lazy.form import Form
from chunked_ce.lazy.logits import Lazy
from chunked_ce.lazy.source import Root
from chunked_ce.lazy.terms import LOGITS, Terms

__all__ = [
    "are_of_the_same",
    "are_the_same_tokens",
    "is_exactly",
    "is_log_sum_exp_of",
    "known_log_sum_exp",
    "per_token",
    "remember_log_sum_exp",
    "root_now",
    "should_be_computed",
]

_KNOWN = "_log_sum_exp_of"


def should_be_computed(lazy: Lazy) -> bool:
    """Whether the values are so few that they may as well be computed, with the bits of a layer that is not lazy."""
    return lazy._root.call.is_cheap and not lazy.head.is_sharded


def root_now(lazy: Lazy) -> Root:
    """The root of what is derived from a lazy tensor now."""
    return lazy._root if lazy.requires_grad and torch.is_grad_enabled() else lazy._root.detached()


def are_the_same_tokens(a: Lazy, b: Lazy) -> bool:
    """Whether they stand for the same rows of the same product, in the same places, with the same gradients."""
    if root_now(a) is not root_now(b) or a.shape != b.shape or a._vocab_dim != b._vocab_dim:
        return False
    if b.is_computed or b._hooked:
        return False
    mine, theirs = ([one.of_tokens for one in lazy._operations if one.of_tokens is not None] for lazy in (a, b))
    return mine == theirs or torch.equal(a._numbers(), b._numbers())


def are_of_the_same(a: Lazy, b: Lazy) -> bool:
    """Whether their terms are those of the same logits."""
    return a._form.is_same(b._form) and are_the_same_tokens(a, b)


def is_exactly(lazy: Lazy, terms: Terms) -> bool:
    mine = lazy._terms
    return mine.keys() == terms.keys() and not mine.tensors and all(mine[word] == terms[word] for word in mine)


def per_token(value: Any, lazy: Lazy) -> tuple[Tensor, Tensor] | None:
    """A copy of a tensor that is the same for all words of a token, and that in the shape of the tokens, with 1 in
    place of the vocabulary; None for anything else."""
    if not isinstance(value, Tensor) or isinstance(value, Lazy) or value.is_complex() or value.is_meta:
        return None
    if type(value) not in (Tensor, torch.nn.Parameter) or (value.dim() and value.device != lazy.device):
        return None
    if value.dim() == 0 and not value.requires_grad:  # a number that is not finite
        return None
    if value.dim() > lazy.dim() or (value.requires_grad and not lazy.requires_grad):
        return None
    shape = (1,) * (lazy.dim() - value.dim()) + tuple(value.shape)
    tokens = list(lazy.shape)
    tokens[lazy._vocab_dim] = 1
    if any(size not in (1, whole) for size, whole in zip(shape, tokens, strict=True)):
        return None
    kept = value.clone()  # the caller may change it before the logits are used
    dtype = lazy.dtype if not kept.is_floating_point() else torch.promote_types(lazy.dtype, kept.dtype)
    return kept, kept.to(lazy.device, dtype).view(shape).expand(tokens)


class _LogSumExp(NamedTuple):
    """Whose log-sum-exp a tensor is."""

    root: weakref.ref[Root]
    form: Form
    numbers: Tensor  # of the product's rows, in the order of the values
    version: int  # of the values

    def is_of(self, lazy: Lazy, found: Tensor) -> bool:
        """Whether ``found``, with 1 in place of V, holds the values of the tokens of ``lazy``."""
        if self.root() is not root_now(lazy) or found._version != self.version or not self.form.is_same(lazy._form):
            return False
        places = lazy._numbers()
        return found.shape == places.shape and torch.equal(places.flatten(), self.numbers)


def remember_log_sum_exp(found: Tensor, lazy: Lazy) -> Tensor:
    """``found``, known as the log-sum-exp of the tokens of ``lazy``."""
    root, numbers = root_now(lazy), lazy._numbers().flatten()
    known = _LogSumExp(weakref.ref(root), lazy._form, numbers, found._version)
    setattr(found, _KNOWN, known)
    root.call.log_sum_exps.append((weakref.ref(found), known))
    return found


def known_log_sum_exp(lazy: Lazy) -> Tensor | None:
    """The log-sum-exp of a lazy tensor's logits, with 1 in place of V, if somebody holds it."""
    for reference, known in lazy._root.call.log_sum_exps:
        found = reference()
        if found is not None:
            found = found if found.dim() == lazy.dim() else found.unsqueeze(lazy._vocab_dim)
            if known.is_of(lazy, found):
                return found
    return None


def is_log_sum_exp_of(value: Any, lazy: Lazy) -> bool:
    """Whether this is the log-sum-exp of a lazy tensor's logits, or a view of it with 1 in place of the vocabulary."""
    if not isinstance(value, Tensor) or not lazy._terms.keys() >= LOGITS.keys() or value.dim() != lazy.dim():
        return False
    for one in (value, value._base):
        known: _LogSumExp | None = getattr(one, _KNOWN, None)
        if one is None or known is None or not value.is_contiguous() or not one.is_contiguous():
            continue
        if known.is_of(lazy, value):
            return value.requires_grad == one.requires_grad
    return False
