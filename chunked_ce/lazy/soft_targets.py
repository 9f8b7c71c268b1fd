"""Handlers of distributions over the vocabulary as targets: divergences, and soft labels.

A sum over the vocabulary of something of each word is computed at once, one pass over the head; what it is lazy about
are the words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from chunked_ce.functional import linear_loss
from chunked_ce.lazy.answers import maths
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, LazyTerms
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.terms import LOG_PROBABILITIES, PROBABILITIES, TOTAL, Terms
from chunked_ce.lazy.together import is_exactly, should_be_computed
from chunked_ce.objectives import Divergence, Teacher

__all__ = ["Kept", "can_be_target", "can_teach", "divergence", "divergence_loss", "rows_of", "times_tensor"]


def can_be_target(lazy: Lazy, target: Any) -> bool:
    """Whether a tensor is constant and has a number for each word of the tokens of ``lazy``."""
    if type(target) not in (Tensor, torch.nn.Parameter) or target.requires_grad or target.shape != lazy.shape:
        return False
    if not target.is_floating_point() or target.device != lazy.device or lazy._vocab_dim != lazy.dim() - 1:
        return False
    if not _temperature_is_linear(lazy):
        return False
    return not lazy.head.is_sharded or lazy.head.vocab is not None


def rows_of(lazy: Lazy, target: Tensor) -> Iterator[Tensor]:
    """The rows (m, V) of a target, some at a time, in float32 or more."""
    for some in target.reshape(-1, target.shape[-1]).split(max(1, lazy._root.call.rows_per_block)):
        yield some.to(torch.promote_types(some.dtype, torch.float32))


class _Target(NamedTuple):
    """Sums over the words of a constant target t, or of exp(t) for a ``log`` target, with 1 in place of V."""

    tensor: Tensor
    log: bool
    total: Tensor  # the sum of the probabilities
    negentropy: Tensor | None  # the sum of t log t

    @classmethod
    def of(cls, lazy: Lazy, target: Any, log: bool) -> _Target | None:
        """None for what cannot be a target of the tokens of ``lazy``."""
        if not can_be_target(lazy, target):
            return None
        totals, negentropies = [], []
        for some in rows_of(lazy, target):
            if not log and bool((some < 0).any()):
                return None
            totals.append(some.logsumexp(-1).exp() if log else some.sum(-1))
            negentropies.append(totals[-1] if log else torch.xlogy(some, some).sum(-1))
        if not totals:
            return None
        shape = (*target.shape[:-1], 1)
        return cls(target, log, torch.cat(totals).view(shape), None if log else torch.cat(negentropies).view(shape))

    @property
    def teacher(self) -> Teacher:
        return Teacher(logits=self.tensor) if self.log else Teacher(probabilities=self.tensor)


def divergence(lazy: Lazy, teacher: Teacher | Lazy, beta: float, counted: Tensor | None = None) -> Tensor:
    """The divergence of each token, with 1 in place of V; 0 where it is not ``counted``."""
    counted = None if counted is None else counted.squeeze(lazy._vocab_dim)
    found: Tensor = divergence_loss(lazy, teacher, beta, counted, reduction="none")
    return found.unsqueeze(lazy._vocab_dim)


def divergence_loss(
    lazy: Lazy, teacher: Teacher | Lazy, beta: float, counted: Tensor | None = None, **keywords: Any
) -> Any:
    """`linear_loss` of the divergence, with its ``keywords``, over the tokens (...) that are ``counted``."""
    tracked = lazy.requires_grad and torch.is_grad_enabled()

    def of_student(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        factors, formed = _without_temperature(*maths(lazy, hidden, weight, bias))
        target = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        if counted is not None:
            target = target.masked_fill(~counted, -100)

        def of(teacher: Teacher) -> Any:
            given = formed | {"teacher": teacher, "options": lazy.head.options} | keywords
            return linear_loss(Divergence(beta), *factors, target, **given)

        if isinstance(teacher, Teacher):
            return of(teacher)
        its_logits = teacher

        def of_teacher(states: Tensor, its_weight: Tensor, its_bias: Tensor | None) -> Any:
            (states, its_weight), its = maths(its_logits, states, its_weight, its_bias)
            if "linear_adapter" in its:
                low_rank_states, low_rank_weight = its["linear_adapter"]
                states = torch.cat([states, low_rank_states.to(states.dtype)], -1)
                its_weight = torch.cat([its_weight, low_rank_weight.to(its_weight.dtype)], -1)
            with lazy._root.call.as_it_was(tracked):
                return of(Teacher(states, its_weight, its["linear_bias"], its["softcap"], its["logit_scale"]))

        return its_logits.request(of_teacher)

    return lazy.request(of_student)


def can_teach(teacher: Lazy, lazy: Lazy) -> bool:
    """Whether a lazy tensor stands for constant distributions of the tokens of another one."""
    plain = teacher._form.temperature is None and teacher._root.call.low_rank_weight is None
    alike = teacher.shape == lazy.shape and teacher._vocab_dim == lazy._vocab_dim == lazy.dim() - 1
    constant = not (teacher.requires_grad and torch.is_grad_enabled())
    here = _has_same_rows(teacher, lazy) and teacher.head.layout is None and lazy.head.layout is None
    return plain and alike and constant and here and _temperature_is_linear(lazy)


def _temperature_is_linear(lazy: Lazy) -> bool:
    """Whether tokens have no temperatures of their own, or such as may divide the hidden states in place of logits."""
    is_precise = lazy._root.call.dtype in (torch.float32, torch.float64)  # their quotient is rounded to it
    return lazy._form.temperature is None or (lazy._form.softcap is None and is_precise)


def _without_temperature(
    factors: tuple[Tensor, Tensor], keywords: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The same logits with the tokens' temperatures in the hidden states, and the bias as an adapter of rank 1.

    The temperature of a loss would divide the logits of its teacher too.
    """
    temperature, bias = keywords.pop("temperature", None), keywords["linear_bias"]
    if temperature is None:
        return factors, keywords
    hidden, weight = factors
    adapters = [keywords["linear_adapter"]] if "linear_adapter" in keywords else []
    if bias is not None:
        adapters.append((torch.ones_like(hidden[..., :1]), bias.unsqueeze(1).to(weight.dtype)))

    def divided(states: Tensor) -> Tensor:
        quotient: Tensor = states / temperature.unsqueeze(-1)
        return quotient.to(hidden.dtype)

    if adapters:
        states, low_rank_weights = zip(*adapters, strict=True)
        keywords["linear_adapter"] = (divided(torch.cat(states, -1)), torch.cat(low_rank_weights, -1))
    return (divided(hidden), weight), keywords | {"linear_bias": None}


def _has_same_rows(teacher: Lazy, lazy: Lazy) -> bool:
    """Whether this rank holds the rows of the same words of both heads."""
    vocab = lazy.head.vocab
    return teacher.head.vocab == vocab and (vocab is None or bool(teacher._form.words == lazy._form.words))


@follows("kl_div", F, either=True)
def _kl_div(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if (size_average, reduce) != (None, None):
        reduction = _reduction.legacy_get_string(size_average, reduce)
    found = _kl_of_tokens(input, target, log_target) if reduction in ("none", "sum", "mean", "batchmean") else None
    if found is None:
        return None
    lazy, total = found
    if reduction == "none":
        return _of_words(
            lazy, total, input, target, functools.partial(F.kl_div, reduction="none", log_target=log_target)
        )
    size = {"sum": 1, "mean": lazy.numel(), "batchmean": lazy.shape[0]}[reduction]
    return total.sum() / size


def _kl_of_tokens(input: Any, target: Any, log: bool) -> tuple[Lazy, Tensor] | None:
    """The student, and the sum over words of ``target * (log target - input)``, with 1 in place of V."""
    of_target = LOG_PROBABILITIES if log else PROBABILITIES
    forward = isinstance(input, Lazy) and is_exactly(input, LOG_PROBABILITIES)
    backward = isinstance(target, Lazy) and is_exactly(target, of_target)
    if forward and backward:
        if can_teach(target, input):
            return input, divergence(input, target, 0.0)
        return (target, divergence(target, input, 1.0)) if can_teach(input, target) else None
    if forward and not isinstance(target, Lazy) and not should_be_computed(input):
        known = _Target.of(input, target, log)
        if known is None:
            return None
        found = divergence(input, known.teacher, 0.0, known.total > 0)
        return input, known.total * found + torch.xlogy(known.total, known.total)
    if backward and not isinstance(input, Lazy) and not should_be_computed(target):
        known = _Target.of(target, input, True)
        return None if known is None else (target, divergence(target, known.teacher, 1.0) - known.total.log())
    return None


def times_tensor(lazy: Lazy, other: Any) -> Lazy | None:
    """Log-probabilities times soft labels, a constant tensor of their shape."""
    if not is_exactly(lazy, LOG_PROBABILITIES) or should_be_computed(lazy) or isinstance(other, Lazy):
        return None
    known = _Target.of(lazy, other, False)
    if known is None or known.negentropy is None:
        return None
    found = divergence(lazy, known.teacher, 0.0, known.total > 0)
    total = known.negentropy - torch.xlogy(known.total, known.total) - known.total * found
    return _of_words(lazy, total, lazy, other, torch.mul)


def _of_words(lazy: Lazy, total: Tensor, input: Any, target: Any, function: Callable[..., Tensor]) -> Lazy:
    """What ``function`` makes of each word, whose sum is known."""
    kept = [None if one is lazy else Kept.of(one) for one in (input, target)]

    def of_logits(x: Tensor) -> Tensor:
        return function(*(x if one is None else one(x) for one in kept))

    return lazy.derive(Operation(of_logits, is_per_token=True), cls=LazyTerms, terms=Terms({TOTAL: total}))


class Kept(NamedTuple):
    """A tensor of words that values may be computed with later."""

    tensor: Tensor  # lazy or not
    version: int | None
    operations: tuple[Operation, ...]  # of a lazy one

    @classmethod
    def of(cls, tensor: Tensor) -> Kept:
        return cls(tensor, None, tensor._operations) if isinstance(tensor, Lazy) else cls(tensor, tensor._version, ())

    @property
    def is_unchanged(self) -> bool:
        return self.version is None or self.version == self.tensor._version

    def __call__(self, x: Tensor) -> Tensor:
        """The values, or for a stand-in ``x`` a stand-in."""
        lazy = self.tensor if isinstance(self.tensor, Lazy) else None
        if x.is_meta:
            return torch.empty_like(self.tensor, device="meta") if lazy is None else lazy._stand_in
        if lazy is not None:
            return lazy._root.value(self.operations, lazy.requires_grad)
        if not self.is_unchanged:
            raise RuntimeError(
                "a target was changed in place after a divergence from it, whose words are asked for now"
            )
        return self.tensor
