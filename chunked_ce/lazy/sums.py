"""Sums of the logits of two heads: those of one head, with the other one as its low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch

from chunked_ce.lazy.head import is_whole
from chunked_ce.lazy.logits import Lazy, LazyLogits
from chunked_ce.lazy.source import Call
from chunked_ce.lazy.together import should_be_computed
from chunked_ce.rows.statistics import Logits

__all__ = ["of_two_heads"]


def of_two_heads(one: Lazy, other: Lazy, sign: float) -> Any:
    """``one + sign * other``, lazy where both are linear in their hidden states and both heads are at hand."""
    if not all(map(_is_linear, (one, other))) or one.shape != other.shape or one.dtype != other.dtype:
        return None
    for lazy in (one, other):
        lazy.join_graph()  # a dispatch does so for the first argument only
    pairs = [(one, one._form.scale), (other, sign * other._form.scale)]
    pairs.sort(key=lambda pair: not pair[0].requires_grad)  # the adapter may be detached
    (lazy, scale), (added, its_scale) = pairs
    first, second, ratio = lazy._root.call, added._root.call, its_scale / scale
    weight, bias = second.parameters
    if first.head.vocab != second.head.vocab or (bias is not None and first.head.vocab is not None):
        return None
    first.check_unchanged()
    second.check_unchanged()
    tracked, width = lazy.requires_grad and torch.is_grad_enabled(), added.head.in_features
    adapters = [(lazy._hidden[..., lazy.head.in_features :], first.low_rank_weight)]
    for hidden, factor in (
        (added._hidden[..., :width], weight),
        (added._hidden[..., width:], second.low_rank_weight),
    ):
        if factor is not None:
            adapters.append((hidden * ratio, factor if added.requires_grad else factor.detach()))
    parts = [part for part, factor in adapters if factor is not None]
    factors = [factor for _, factor in adapters if factor is not None]
    with first.as_it_was(tracked):
        joint = torch.cat([lazy._hidden[..., : lazy.head.in_features], *parts], -1)
        factor = factors[0] if len(factors) == 1 else torch.cat(factors, -1)
        if tracked and factor.requires_grad and not joint.requires_grad:
            joint.requires_grad_()
        call = Call(first.head, joint, factor, first.purpose)
        found = LazyLogits.of_call(call, joint, first.head.vocab_size, Logits(scale, None)).to(one.dtype)
        if bias is None:
            return found
        return found + (bias if added.requires_grad else bias.detach()) * its_scale


def _is_linear(lazy: Lazy) -> bool:
    """Whether these are scaled products of hidden states with a head that is at hand."""
    if not isinstance(lazy, LazyLogits) or lazy.is_computed:  # values may have been changed in place
        return False
    if lazy._vocab_dim != lazy.dim() - 1 or lazy.head.layout is not None:
        return False
    form, parameters = lazy._form, lazy._root.call.parameters
    plain = form.scale != 0 and all(other is None for other in form[1:])
    here = all(mine is its for mine, its in zip(parameters, lazy.head.own_parameters(), strict=True))
    whole = lazy.head.vocab is not None or is_whole(parameters[0])
    return plain and here and whole and not hasattr(parameters[0], "ds_id") and not should_be_computed(lazy)
