"""Handlers of arithmetic, word by word: scales and shifts, softcaps, probabilities and their logarithms, products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.lazy.answers import same_for_all_words
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.form import Form
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyTerms
from chunked_ce.lazy.soft_targets import times_tensor
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.sums import of_two_heads
from chunked_ce.lazy.terms import LOG_PROBABILITIES, LOGITS, ONE, PROBABILITIES, Terms, Word
from chunked_ce.lazy.together import (
    are_of_the_same,
    are_the_same_tokens,
    is_log_sum_exp_of,
    per_token,
    should_be_computed,
)

__all__ = ["is_over_words", "log_softmax", "number_of", "of_softmax", "operand_of"]


# ---- scale and softcap ----


@follows("mul multiply __mul__ __rmul__")
def _mul(lazy: Lazy, other: Any) -> Lazy | None:
    number = number_of(other)
    if number is not None:
        return _scale(lazy, number, lambda x: x * operand_of(number, x))
    if isinstance(other, Lazy):
        return _of_both(lazy, other, torch.mul, Terms.times)
    found = _by_token(lazy, other, torch.mul, lambda factor: lazy._terms.scaled(factor))
    return times_tensor(lazy, other) if found is None else found


@follows("div divide true_divide __truediv__")
def _div(lazy: Lazy, other: Any, *, rounding_mode: str | None = None) -> Lazy | None:
    number = number_of(other)
    if number == 0 or rounding_mode is not None:
        return None
    if number is None:
        return _by_token(lazy, other, torch.div, lambda factor: lazy._terms.scaled(1 / factor))
    return _scale(lazy, 1 / number, lambda x: x / operand_of(number, x))


@follows("neg negative __neg__")
def _neg(lazy: Lazy) -> Lazy | None:
    return _scale(lazy, -1.0, torch.neg)


@follows("tanh")
def _tanh(lazy: Lazy) -> Lazy | None:
    if not isinstance(lazy, LazyLogits) or lazy._form.softcap is not None:
        return None
    return lazy.derive(Operation(torch.tanh, of_rows=torch.tanh), form=lazy._form._replace(softcap=1.0))


def number_of(value: Any) -> float | None:
    """A finite constant, which may come in a tensor without dimensions."""
    if isinstance(value, Tensor):
        if isinstance(value, Lazy) or value.dim() or value.requires_grad or value.is_complex() or value.is_meta:
            return None
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def operand_of(number: float, x: Tensor) -> float | Tensor:
    """The factor for ``x``: a stand-in times a number would get other strides in dimensions of size 1."""
    return x.new_empty(()) if x.is_meta else number


def _scale(lazy: Lazy, number: float, operation: Callable[[Tensor], Tensor]) -> Lazy | None:
    """``number`` times a lazy tensor, which ``operation`` computes."""
    if not math.isfinite(number):
        return None
    scaled = Operation(operation, of_rows=operation)
    if isinstance(lazy, LazyLogits):
        form = lazy._form.scaled(number)
        return None if form is None else lazy.derive(scaled, form=form)
    terms = lazy._terms.scaled(number)
    finite = all(math.isfinite(factor) for factor in terms.values() if not isinstance(factor, Tensor))
    return lazy.derive(scaled, terms=terms) if finite else None


def _in_place(handler: Callable[..., Lazy | None]) -> Callable[..., Lazy | None]:
    """The same in place, where no other tensor shares the logits that would change."""

    @functools.wraps(handler)
    def change(lazy: Lazy, *args: Any, **kwargs: Any) -> Lazy | None:
        result = handler(lazy, *args, **kwargs)
        return lazy if result is not None and lazy.become(result) else None

    return change


follows("mul_ multiply_ __imul__", Tensor)(_in_place(_mul))
follows("div_ divide_ true_divide_ __itruediv__ __idiv__", Tensor)(_in_place(_div))
follows("tanh_")(_in_place(_tanh))
follows("neg_ negative_")(_in_place(_neg))


# ---- sums, and what is the same for all words of a token ----


@follows("add __add__ __radd__")
def _add(lazy: Lazy, other: Any, *, alpha: float = 1) -> Lazy | None:
    if alpha != 1:
        return None
    number = number_of(other)
    if number is not None:
        terms = lazy._terms.plus(Terms({ONE: number}))
        return _changed(lazy, lambda x: x + operand_of(number, x), terms)
    if isinstance(other, Lazy):
        found = _of_both(lazy, other, torch.add, Terms.plus)
        return of_two_heads(lazy, other, 1.0) if found is None else found
    if _is_bias(lazy, other):
        return _with_bias(lazy, other, torch.add, 1.0)
    return _by_token(lazy, other, torch.add, lambda factor: lazy._terms.plus(Terms({ONE: factor})))


@follows("sub subtract __sub__", either=True)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Lazy | None:
    if alpha != 1:
        return None
    if not isinstance(input, Lazy):
        return _reversed_sub(other, input)
    lazy, number = input, number_of(other)
    if number is not None:
        terms = lazy._terms.plus(Terms({ONE: -number}))
        return _changed(lazy, lambda x: x - operand_of(number, x), terms)
    if isinstance(other, Lazy):
        found = _of_both(lazy, other, torch.sub, lambda mine, its: mine.plus(its.scaled(-1.0)))
        return of_two_heads(lazy, other, -1.0) if found is None else found
    if _is_bias(lazy, other):
        return _with_bias(lazy, other, torch.sub, -1.0)
    if is_log_sum_exp_of(other, lazy):
        return _by_token(lazy, other, torch.sub, lambda _: lazy._terms.plus(Terms({Word(lse=1): -1.0})))
    return _by_token(lazy, other, torch.sub, lambda factor: lazy._terms.plus(Terms({ONE: -factor})))


@follows("rsub __rsub__")
def _reversed_sub(lazy: Lazy, other: Any, *, alpha: float = 1) -> Lazy | None:
    """``other - lazy``."""
    if alpha != 1 or isinstance(other, Lazy) or not isinstance(lazy, Lazy):
        return None
    number, terms = number_of(other), lazy._terms.scaled(-1.0)
    if number is not None:
        return _changed(lazy, lambda x: operand_of(number, x) - x, terms.plus(Terms({ONE: number})))
    return _by_token(lazy, other, lambda x, y: y - x, lambda factor: terms.plus(Terms({ONE: factor})))


def _is_bias(lazy: Lazy, value: Any) -> bool:
    """Whether a tensor has a number for each word, the same for all tokens, that can be part of the product."""
    if not isinstance(lazy, LazyLogits) or type(value) not in (Tensor, torch.nn.Parameter) or not value.dim():
        return False
    form, size = lazy._form, lazy.shape[lazy._vocab_dim]
    is_last = lazy._vocab_dim == lazy.dim() - 1 and value.dim() <= lazy.dim()
    is_wide = value.shape[-1] == value.numel() == size > 1 and value.device == lazy.device
    can_train = lazy.requires_grad and not lazy.head.is_sharded
    is_linear = form.softcap is None and form.scale != 0 and lazy.head.layout is None
    return is_last and is_wide and is_linear and value.is_floating_point() and (can_train or not value.requires_grad)


def _with_bias(lazy: Lazy, value: Tensor, function: Callable[..., Tensor], sign: float) -> Lazy | None:
    """The logits plus, or minus, a bias of the words."""
    if should_be_computed(lazy):
        return None
    kept, form = value.clone(), lazy._form  # the caller may change it before the logits are used
    dtype = torch.promote_types(torch.promote_types(kept.dtype, lazy.dtype), torch.float32)
    bias = kept.view(-1).to(dtype) * (sign / form.scale)
    operation = Operation(
        lambda x: function(x, torch.empty_like(kept, device="meta") if x.is_meta else kept),
        of_rows=lambda rows: function(rows, kept.view(-1)),
    )
    return lazy.derive(operation, form=form._replace(bias=bias if form.bias is None else form.bias + bias))


def _changed(lazy: Lazy, function: Callable[..., Tensor], terms: Terms | None, form: Form | None = None) -> Lazy | None:
    """The terms that ``function`` of a tensor makes of another."""
    if terms is None or should_be_computed(lazy):
        return None
    operation = Operation(function, of_rows=function)
    return lazy.derive(operation, cls=LazyTerms, terms=terms, form=form or lazy._form)


def _of_both(
    lazy: Lazy, other: Lazy, function: Callable[..., Tensor], combine: Callable[[Terms, Terms], Terms | None]
) -> Lazy | None:
    """The terms that ``function`` makes of two lazy tensors of the same logits."""
    if should_be_computed(lazy):
        return None
    mine: Terms | None
    its: Terms | None
    if are_of_the_same(lazy, other):
        form, mine, its = lazy._form, lazy._terms, other._terms
    elif lazy._form.temperature is None:
        form, mine, its = other._form, _at_temperature_of(other, lazy), other._terms
    else:
        form, mine, its = lazy._form, lazy._terms, _at_temperature_of(lazy, other)
    terms = None if mine is None or its is None else combine(mine, its)
    if terms is None:
        return None
    operation = Operation(
        function,
        of_rows=function,
        is_per_token=any(step.is_per_token for step in other._operations),
        others=(other._operations,),
        stand_ins=(other._stand_in,),
    )
    return lazy.derive(operation, cls=LazyTerms, terms=terms, form=form)


def _at_temperature_of(tempered: Lazy, plain: Lazy) -> Terms | None:
    """The terms of ``plain``, logits over temperatures of their tokens, in the logits of ``tempered``, such as their
    probabilities; None for anything else."""
    temperature = tempered._form.temperature
    form = None if temperature is None else of_softmax(plain)
    if temperature is None or form is None or form.temperature is None or not are_the_same_tokens(tempered, plain):
        return None
    shift = plain._terms.shift()
    same = form._replace(temperature=temperature).is_same(tempered._form) and shift.keys() <= {ONE}
    return LOGITS.plus(shift) if same and torch.equal(form.temperature, temperature) else None


def _by_token(
    lazy: Lazy, other: Any, function: Callable[..., Tensor], terms_of: Callable[[Tensor], Terms]
) -> Lazy | None:
    """The terms that ``function`` makes of a lazy tensor and a tensor that is the same for all words of a token."""
    found = per_token(other, lazy)
    if found is None or should_be_computed(lazy):
        return None
    operand, factor = found

    def of_logits(x: Tensor) -> Tensor:
        return function(x, torch.empty_like(operand, device="meta") if x.is_meta else operand)

    return lazy.derive(Operation(of_logits, is_per_token=True), cls=LazyTerms, terms=terms_of(factor))


# ---- probabilities ----


def is_over_words(lazy: Lazy, dim: Any) -> bool:
    return isinstance(dim, int) and -lazy.dim() <= dim < lazy.dim() and dim % lazy.dim() == lazy._vocab_dim


def of_softmax(lazy: Lazy) -> Form | None:
    """The form of the logits whose softmax is that of this tensor, which may be shifted by something per token."""
    if isinstance(lazy, LazyLogits):
        return lazy._form
    slope, form = lazy._terms.slope(), lazy._form
    if slope is None:
        return None
    if not isinstance(slope, Tensor):
        if form.temperature is not None:
            return form._replace(temperature=form.temperature / slope) if slope > 0 else None
        return form.scaled(slope)
    if slope.requires_grad or not bool((slope > 0).all() & slope.isfinite().all()):
        return None
    temperature = slope.reciprocal()
    return form._replace(temperature=temperature if form.temperature is None else form.temperature * temperature)


def _softmax_of(
    input: Lazy, dim: int, dtype: torch.dtype | None, function: Callable[..., Tensor], terms: Terms
) -> Lazy | None:
    form = of_softmax(input) if is_over_words(input, dim) else None
    if form is None:
        return None
    raised = input if dtype is None else input.to(dtype)
    if not isinstance(raised, Lazy) or raised.is_computed:
        return None
    dtype = _dtype_of(function, raised) if dtype is None else dtype

    def of_logits(x: Tensor) -> Tensor:
        # The values are always contiguous, but torch gives a stand-in other strides in dimensions of size 1.
        return torch.empty(x.shape, dtype=dtype, device="meta") if x.is_meta else function(x, dim, dtype=dtype)

    operation = Operation(of_logits, of_rows=lambda x: function(x, -1, dtype=dtype))
    return raised.derive(operation, cls=LazyTerms, terms=terms, form=form)


def _dtype_of(function: Callable[..., Tensor], lazy: Lazy) -> torch.dtype:
    """The dtype of a function's result under autocast, which differs between devices and skips a stand-in."""
    if not torch.is_autocast_enabled(lazy.device.type):
        return lazy.dtype
    example = torch.zeros(1, dtype=lazy.dtype, device=lazy.device)
    return (function(example, -1) if function in (torch.softmax, torch.log_softmax) else function(example)).dtype


@follows("log_softmax", Tensor, torch, torch.special)
def log_softmax(input: Lazy, dim: int, dtype: torch.dtype | None = None) -> Lazy | None:
    """The log-probabilities; None where they are not followed."""
    return _softmax_of(input, dim, dtype, torch.log_softmax, LOG_PROBABILITIES)


@follows("log_softmax", F)
def _f_log_softmax(
    input: Lazy, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Lazy | None:
    return None if dim is None else log_softmax(input, dim, dtype)


@follows("softmax", Tensor, torch, torch.special)
def _softmax(input: Lazy, dim: int, dtype: torch.dtype | None = None) -> Lazy | None:
    if should_be_computed(input):
        return None
    return _softmax_of(input, dim, dtype, torch.softmax, PROBABILITIES)


@follows("softmax", F)
def _f_softmax(
    input: Lazy, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Lazy | None:
    return None if dim is None else _softmax(input, dim, dtype)


@follows("exp")
def _exp(lazy: Lazy) -> Lazy | None:
    found = lazy._terms.power
    if found is None:
        return None
    if should_be_computed(lazy):
        return None
    power, shift = found
    factor = same_for_all_words(lazy, shift)
    factor = factor.exp() if isinstance(factor, Tensor) else math.exp(factor) if factor < 700 else math.inf
    # An infinite factor times a probability of 0 is NaN, where the exponential of a logit is finite.
    if not (bool(factor.isfinite().all()) if isinstance(factor, Tensor) else 0 < factor < math.inf):
        return None
    return _changed(lazy, _casting(torch.exp, lazy), Terms({Word(p=power): factor}))


@follows("square")
def _square(lazy: Lazy) -> Lazy | None:
    return _changed(lazy, torch.square, lazy._terms.times(lazy._terms))


@follows("pow __pow__")
def _pow(lazy: Lazy, exponent: Any) -> Lazy | None:
    terms = lazy._terms.times(lazy._terms) if number_of(exponent) == 2 else None
    return _changed(lazy, lambda x: x**exponent, terms)


@follows("log")
def _log(lazy: Lazy) -> Lazy | None:
    if len(lazy._terms) != 1:
        return None
    ((word, factor),) = lazy._terms.items()
    if word.logp or word.lse or not word.p or (not isinstance(factor, Tensor) and factor <= 0):
        return None
    shift = factor.log() if isinstance(factor, Tensor) else math.log(factor)
    terms = Terms({Word(logp=1): float(word.p)}).plus(Terms({ONE: shift}))
    return _changed(lazy, _casting(torch.log, lazy), terms)


def _casting(function: Callable[[Tensor], Tensor], lazy: Lazy) -> Callable[[Tensor], Tensor]:
    """The ``function`` in the dtype that autocast gives it now."""
    dtype = _dtype_of(function, lazy)
    return lambda x: function(x.to(dtype))


@follows("clamp clip clamp_min", Tensor, torch)
def _clamp(lazy: Lazy, min: Any = None, max: Any = None) -> Lazy | None:
    """Bounds that no finite number passes, as `torch.distributions` sets them."""
    limits = torch.finfo(lazy.dtype)
    least, most = number_of(limits.min if min is None else min), number_of(limits.max if max is None else max)
    if least is None or most is None or least > limits.min or most < limits.max:
        return None

    def clamp(x: Tensor) -> Tensor:
        return x.clamp(least, most)

    return None if should_be_computed(lazy) else lazy.derive(Operation(clamp, of_rows=clamp))
