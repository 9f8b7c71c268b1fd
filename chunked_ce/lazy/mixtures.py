"""Handlers of the generalised Jensen-Shannon divergence, written word by word.

With the student's log-probabilities s and the teacher's t, code takes ``m = logsumexp(stack([s + log(1 - b), t +
log(b)]), 0)``, two divergences from it, ``kl_div(m, t)`` and ``kl_div(m, s)``, and their sum with the weights b and
1 - b (arXiv:2306.13649, section 2). The sum over words of that is `Divergence`; what is made on the way is only
remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from chunked_ce.lazy.arithmetic import number_of, operand_of
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, LazyMixture, LazyTerms
from chunked_ce.lazy.soft_targets import Kept, can_be_target, can_teach, divergence, rows_of
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.terms import LOG_PROBABILITIES, ONE, PROBABILITIES, TOTAL, Terms
from chunked_ce.lazy.together import are_of_the_same, is_exactly, should_be_computed
from chunked_ce.objectives import Teacher

__all__ = ["stacked"]

_UNKNOWN_TOTAL = Terms({TOTAL: math.nan})  # a mixture has handlers of its own, which do not read it


class _State(NamedTuple):
    """What a lazy mixture is."""

    student: Lazy  # log-probabilities, plus the logarithm of its share
    teacher: Kept  # the same
    log_share: float  # of the student
    log_share_of_teacher: float | None  # None where it is no lazy tensor
    dim: int | None = None  # along which the two are stacked; None once they are added
    target: Kept | None = None  # the teacher's (log-)probabilities themselves, where they are no lazy tensor
    log_target: bool = True
    of_student: float = 0.0  # times the divergence of the student from the mixture
    of_teacher: float = 0.0

    @property
    def is_divergence(self) -> bool:
        return bool(self.of_student or self.of_teacher)


def stacked(parts: list[Any], dim: int) -> Any:
    """The log-probabilities of two heads, each with a number added, as a `torch.stack` of them."""
    state = _of_pair(*parts) if len(parts) == 2 else None
    if state is None or not isinstance(dim, int) or not -state.student.dim() <= dim + 1 <= state.student.dim() + 1:
        return None
    dim %= state.student.dim() + 1
    return _make(state._replace(dim=dim), parts, lambda *values: torch.stack(values, dim))


@follows("logaddexp", either=True)
def _logaddexp(input: Any, other: Any) -> Any:
    state = _of_pair(input, other)
    return None if state is None else _make(state, (input, other), torch.logaddexp)


@follows("logsumexp", torch, Tensor, torch.special, mixtures=True)
def _logsumexp(mixed: LazyMixture, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    state = mixed._state
    if state.dim is None or keepdim or not isinstance(dim, int) or dim % mixed.dim() != state.dim:
        return None
    return _derive(mixed, lambda x: x.logsumexp(dim), state._replace(dim=None))


def _of_pair(one: Any, other: Any) -> _State | None:
    """The mixture of a student, which has the gradient, and a teacher."""
    pairs = [(one, other), (other, one)]
    pairs.sort(key=lambda pair: not (isinstance(pair[0], Lazy) and pair[0].requires_grad))
    for student, teacher in pairs:
        share = _log_share(student) if isinstance(student, LazyTerms) else None
        if share is None or should_be_computed(student):
            continue
        its_share = _log_share(teacher) if isinstance(teacher, LazyTerms) else None
        if isinstance(teacher, LazyTerms):
            plain = its_share is not None and student.dtype == teacher.dtype and can_teach(teacher, student)
        else:
            plain = can_be_target(student, teacher)
        if plain:
            return _State(student, Kept.of(teacher), share, its_share)
    return None


def _log_share(lazy: Lazy) -> float | None:
    """The number that is added to log-probabilities, if that is all there is to a lazy tensor."""
    if lazy._terms.tensors:
        return None
    terms = Terms(lazy._terms)
    number = terms.pop(ONE, 0.0)
    return number if isinstance(number, float) and terms == LOG_PROBABILITIES and number < 0 else None


# ---- divergences from the mixture ----


@follows("kl_div", F, computed=True, either=True, mixtures=True)
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
    if not isinstance(input, LazyMixture) or isinstance(target, LazyMixture) or reduction != "none":
        return None
    if isinstance(target, Lazy) and target.is_computed:  # as those of a few tokens of a teacher are
        target = target.materialize()
    state = input._state
    if input.is_computed or state.dim is not None or state.is_divergence:
        return None
    exact = LOG_PROBABILITIES if log_target else PROBABILITIES
    if not isinstance(target, Lazy):
        if not _is_unmixed(state, target, log_target):
            return None
        state = state._replace(of_teacher=1.0, target=Kept.of(target), log_target=log_target)
    elif not is_exactly(target, exact):
        return None
    elif are_of_the_same(target, state.student):
        state = state._replace(of_student=1.0)
    elif isinstance(state.teacher.tensor, Lazy) and are_of_the_same(target, state.teacher.tensor):
        state = state._replace(of_teacher=1.0)
    else:
        return None
    kept = Kept.of(target)
    return _derive(input, lambda x: F.kl_div(x, kept(x), reduction="none", log_target=log_target), state)


def _is_unmixed(state: _State, target: Any, log: bool) -> bool:
    """Whether a tensor has the teacher's (log-)probabilities, to which the logarithm of its share was added."""
    teacher = state.teacher
    if isinstance(teacher.tensor, Lazy) or not teacher.is_unchanged or not can_be_target(state.student, target):
        return False
    dtype = max(state.student.dtype, target.dtype, teacher.tensor.dtype, key=lambda one: torch.finfo(one).eps)
    share = math.log1p(-math.exp(state.log_share))
    for some, mixed in zip(rows_of(state.student, target), rows_of(state.student, teacher.tensor), strict=True):
        some = some if log else some.log()
        differences = (some + share - mixed).nan_to_num(0.0, math.inf, -math.inf).abs()  # -inf less -inf is NaN
        is_normal = some.logsumexp(-1).abs() <= min(64 * torch.finfo(dtype).eps, 0.05)
        if bool((differences > _rounding(mixed, dtype)).any() | ~is_normal.all()):
            return False
    return True


def _rounding(number: Any, dtype: torch.dtype) -> Any:
    """How far two ways to compute a logarithm in ``dtype`` may lie apart."""
    return torch.finfo(dtype).eps * (2 + 2 * abs(number))


@follows("mul multiply __mul__ __rmul__", mixtures=True)
def _mul(mixed: LazyMixture, other: Any) -> Any:
    number = number_of(other)
    if number is None:
        return None
    return _scaled(mixed, number, lambda x: x * operand_of(number, x))


@follows("div divide true_divide __truediv__", mixtures=True)
def _div(mixed: LazyMixture, other: Any, *, rounding_mode: str | None = None) -> Any:
    number = number_of(other)
    if not number or rounding_mode is not None:
        return None
    return _scaled(mixed, 1 / number, lambda x: x / operand_of(number, x))


def _scaled(mixed: LazyMixture, number: float, function: Callable[[Tensor], Tensor]) -> Any:
    state = mixed._state
    if not state.is_divergence or not 0 < number < math.inf:
        return None
    weights = {"of_student": number * state.of_student, "of_teacher": number * state.of_teacher}
    return _derive(mixed, function, state._replace(**weights))


@follows("add __add__ __radd__", mixtures=True)
def _add(mixed: LazyMixture, other: Any, *, alpha: float = 1) -> Any:
    return _sum(mixed, other, 1.0, 1.0, torch.add) if alpha == 1 else None


@follows("lerp", mixtures=True)
def _lerp(mixed: LazyMixture, end: Any, weight: Any) -> Any:
    number = number_of(weight)
    if number is None or not 0 < number < 1:
        return None
    return _sum(mixed, end, 1 - number, number, lambda x, y: torch.lerp(x, y, number))


def _sum(mixed: Any, other: Any, first: float, second: float, function: Callable[..., Tensor]) -> Lazy | None:
    """The weighted sum of two divergences from the same mixture."""
    if not isinstance(mixed, LazyMixture) or not isinstance(other, LazyMixture):
        return None
    mine, its = mixed._state, other._state
    alike = mine.student is its.student and mine.teacher.tensor is its.teacher.tensor
    if not alike or not mine.is_divergence or not its.is_divergence or mixed.is_computed or other.is_computed:
        return None
    target, log = (mine.target, mine.log_target) if mine.target is not None else (its.target, its.log_target)
    of_student = first * mine.of_student + second * its.of_student
    of_teacher = first * mine.of_teacher + second * its.of_teacher
    state = mine._replace(target=target, log_target=log, of_student=of_student, of_teacher=of_teacher)
    kept = Kept.of(other)

    def of_values(x: Tensor) -> Tensor:
        return function(x, kept(x))

    if not _is_weighted(state) or not (target is None or target.is_unchanged):
        return _derive(mixed, of_values, state)
    total = (of_student + of_teacher) * _divergence(state)
    return mixed.derive(Operation(of_values, is_per_token=True), cls=LazyTerms, terms=Terms({TOTAL: total}))


def _is_weighted(state: _State) -> bool:
    """Whether the weights are the shares of the mixture, as far as their dtype tells."""
    if not state.of_student or not state.of_teacher:
        return False
    share, dtype = state.of_teacher / (state.of_student + state.of_teacher), state.student.dtype
    pairs = [(math.log1p(-share), state.log_share)]
    if state.log_share_of_teacher is not None:
        pairs.append((math.log(share), state.log_share_of_teacher))
    return all(abs(one - other) <= _rounding(other, dtype) for one, other in pairs)


def _divergence(state: _State) -> Tensor:
    """The generalised Jensen-Shannon divergence of each token, with 1 in place of V."""
    beta = state.of_teacher / (state.of_student + state.of_teacher)
    if state.target is not None:
        target = state.target.tensor
        teacher = Teacher(logits=target) if state.log_target else Teacher(probabilities=target)
        return divergence(state.student, teacher, beta)
    assert isinstance(state.teacher.tensor, Lazy)  # another one has its target
    return divergence(state.student, state.teacher.tensor, beta)


# ---- lazy mixtures ----


def _make(state: _State, parts: Any, function: Callable[..., Tensor]) -> LazyMixture:
    """The lazy mixture that ``function`` makes of two tensors, in their order."""
    kept = [None if one is state.student else Kept.of(one) for one in parts]
    return _derive(state.student, lambda x: function(*(x if one is None else one(x) for one in kept)), state)


def _derive(lazy: Lazy, function: Callable[[Tensor], Tensor], state: _State) -> LazyMixture:
    found = lazy.derive(Operation(function, is_per_token=True), cls=LazyMixture, terms=_UNKNOWN_TOTAL)
    assert isinstance(found, LazyMixture)
    found._state = state
    return found
