"""Handlers of new tensors like a lazy one, of casts by other names, and of parts that are put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.follow import follows, functions
from chunked_ce.lazy.logits import Lazy, LazyLogits
from chunked_ce.lazy.mixtures import stacked
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.together import root_now

__all__ = []


# ---- devices, types and graphs ----


@follows("cpu")
def _cpu(lazy: Lazy, memory_format: torch.memory_format = torch.preserve_format) -> Lazy:
    plain = memory_format is torch.preserve_format and lazy.device.type == "cpu"
    return lazy if plain else NotImplemented


@follows("type", Tensor)
def _type(lazy: Lazy, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        return torch.empty(0, dtype=lazy.dtype, device=lazy.device).type()
    return lazy.to(dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@follows("requires_grad_", Tensor)
def _requires_grad_(lazy: Lazy, requires_grad: bool = True) -> Lazy:
    return lazy if lazy.requires_grad == requires_grad else NotImplemented  # a new leaf must hold values


def _like(function: Callable) -> Callable:
    def create(lazy: Lazy, *args: Any, **kwargs: Any) -> Tensor:
        if not lazy._stand_in.is_contiguous():
            return NotImplemented
        return function(torch.empty((), dtype=lazy.dtype, device=lazy.device).expand(lazy.shape), *args, **kwargs)

    return create


for _function in functions("zeros_like ones_like full_like empty_like rand_like randn_like", torch):
    follows(_function.__name__, torch, computed=True)(_like(_function))


def _creator(function: Callable) -> Callable:
    def create(lazy: Lazy, *args: Any, **kwargs: Any) -> Tensor:
        return function(torch.empty(0, dtype=lazy.dtype, device=lazy.device), *args, **kwargs)

    return create


for _function in functions("new_zeros new_ones new_full new_empty new_tensor", Tensor):
    follows(_function.__name__, Tensor, computed=True)(_creator(_function))


# ---- parts of one call ----


@follows("cat concat concatenate", torch, either=True)
def _cat(tensors: Any, dim: int = 0) -> Any:
    return _together(tensors, dim, torch.cat)


@follows("stack", torch, either=True)
def _stack(tensors: Any, dim: int = 0) -> Any:
    found = _together(tensors, dim, torch.stack)
    return stacked(list(tensors), dim) if found is NotImplemented and isinstance(tensors, tuple | list) else found


def _together(parts: Any, dim: int, join: Callable[..., Tensor]) -> Any:
    """Tokens of one call, which nothing but their places tells apart, in one lazy tensor."""
    parts = list(parts) if isinstance(parts, tuple | list) else []
    if not parts or not all(map(_is_selection, parts)):
        return NotImplemented
    first, root = parts[0], root_now(parts[0])
    if any(root_now(part) is not root or part.requires_grad != first.requires_grad for part in parts):
        return NotImplemented
    positions = torch.arange(root.numbers.numel()).view(root.numbers.shape)
    joined = join([part.tokens_of(positions) for part in parts], dim)  # an error of the shapes is torch's own
    tokens, index = joined.shape[:-1], joined.flatten()
    if joined.shape[-1] != 1:  # along the words
        return NotImplemented

    def of_tokens(x: Tensor) -> Tensor:
        return x.reshape(positions.numel(), x.shape[-1])[index.to(x.device)].view(*tokens, x.shape[-1])

    def of_logits(_: Tensor, *values: Tensor) -> Tensor:
        return join(values, dim)

    others = {"others": tuple(part._operations for part in parts), "stand_ins": tuple(part._stand_in for part in parts)}
    whole = LazyLogits._make(
        root, (), root.hidden, root.vocab_dim, first._form, root.stand_in, tracked=first.requires_grad
    )
    return whole.derive(Operation(of_logits, of_tokens, **others), vocab_dim=len(tokens))


def _is_selection(part: Any) -> bool:
    """Whether these are logits of some tokens as the head gives them."""
    return (
        type(part) is LazyLogits
        and part._vocab_dim == part.dim() - 1
        and part._root.vocab_dim == part._root.stand_in.dim() - 1
        and not any(step.of_rows is not None or step.is_per_token for step in part._operations)
    )
