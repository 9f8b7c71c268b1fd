"""Handlers of what `torch.distributions` asks of logits before it takes an entropy or a log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.answers import log_sum_exp
from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.together import known_log_sum_exp, should_be_computed

__all__: list[str] = []


@follows("eq __eq__")
def _eq(lazy: Lazy, other: Any) -> Tensor | None:
    """Whether a tensor equals itself, by which constraints look for numbers that are not: in a row without one, the
    log-sum-exp is no such number either."""
    if other is not lazy or should_be_computed(lazy):
        return None
    found = known_log_sum_exp(lazy)
    if found is None:
        with torch.no_grad():
            found = log_sum_exp(lazy)
    are_numbers = found.detach() == found.detach()
    return are_numbers.expand(lazy.shape) if are_numbers.all() else None


@follows("broadcast_tensors", torch, torch.functional, either=True)
def _broadcast_tensors(*tensors: Any) -> list[Tensor] | None:
    given: Sequence[Tensor] = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], tuple | list) else tensors
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in given))
    if any(isinstance(one, Lazy) and one.shape != shape for one in given):
        return None
    return [_same(one) if isinstance(one, Lazy) else one.expand(shape) for one in given]


@follows("expand broadcast_to", Tensor, torch)
def _expand(lazy: Lazy, *size: Any) -> Lazy | None:
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    stand_in = lazy._stand_in.expand(*size)
    return _same(lazy) if stand_in.shape == lazy.shape else None


@follows("expand_as", Tensor)
def _expand_as(lazy: Lazy, other: Tensor) -> Lazy | None:
    return _expand(lazy, tuple(other.shape))


def _same(lazy: Lazy) -> Lazy:
    """A view of all of it."""
    return lazy.derive(Operation(lambda x: x.expand(x.shape)))
