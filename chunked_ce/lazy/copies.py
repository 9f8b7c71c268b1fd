"""Handlers of new tensors like a lazy one, of casts by other names, and of parts that are put together again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.follow import follows, functions
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyTerms
from chunked_ce.lazy.mixtures import stacked
from chunked_ce.lazy.source import Operation, through
from chunked_ce.lazy.together import root_now

__all__: list[str] = []


# ---- devices, types and graphs ----


@follows("cpu")
def _cpu(lazy: Lazy, memory_format: torch.memory_format = torch.preserve_format) -> Lazy | None:
    plain = memory_format is torch.preserve_format and lazy.device.type == "cpu"
    return lazy if plain else None


@follows("type", Tensor)
def _type(lazy: Lazy, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        return torch.empty(0, dtype=lazy.dtype, device=lazy.device).type()
    if isinstance(dtype, torch.dtype):
        return lazy.to(dtype)
    found = torch.empty(0).type(dtype)
    return lazy.to(device=found.device, dtype=found.dtype)


@follows("requires_grad_", Tensor)
def _requires_grad_(lazy: Lazy, requires_grad: bool = True) -> Lazy | None:
    return lazy if lazy.requires_grad == requires_grad else None  # a new leaf must hold values


def _like(function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def create(lazy: Lazy, *args: Any, **kwargs: Any) -> Tensor | None:
        example = torch.empty((), dtype=lazy.dtype, device=lazy.device)
        if "memory_format" in kwargs:
            return None
        strides = torch.empty_like(lazy._stand_in).stride()
        order = sorted(range(lazy.dim()), key=lambda dim: -strides[dim])  # of the dimensions in memory
        found = function(example.expand([lazy.shape[dim] for dim in order]), *args, **kwargs)
        return found if order == sorted(order) else found.permute([order.index(dim) for dim in range(lazy.dim())])

    return create


for _function in functions("zeros_like ones_like full_like empty_like rand_like randn_like", torch):
    follows(_function.__name__, torch, computed=True)(_like(_function))


def _creator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
    return stacked(list(tensors), dim) if found is None and isinstance(tensors, tuple | list) else found


def _together(parts: Any, dim: int, join: Callable[..., Tensor]) -> Any:
    """Tokens of one call, with the same done to all of them, in one lazy tensor."""
    parts = list(parts) if isinstance(parts, tuple | list) else []
    if not parts or not all(map(_is_selection, parts)):
        return None
    first, root = parts[0], root_now(parts[0])
    if not all(_is_alike(first, part) for part in parts):
        return None
    positions = torch.arange(root.numbers.numel()).view(root.numbers.shape)
    joined = join([part.tokens_of(positions) for part in parts], dim)  # an error of the shapes is torch's own
    tokens, index = joined.shape[:-1], joined.flatten()
    if join([part._stand_in for part in parts], dim).shape != (*tokens, first.shape[-1]):  # along the words
        return None

    def of_tokens(x: Tensor) -> Tensor:
        return x.reshape(positions.numel(), x.shape[-1])[index.to(x.device)].view(*tokens, x.shape[-1])

    def of_logits(_: Tensor, *values: Tensor) -> Tensor:
        return join(values, dim)

    joined_parts = Operation(
        of_logits,
        of_tokens,
        others=tuple(part._operations for part in parts),
        stand_ins=tuple(part._stand_in for part in parts),
    )
    whole = LazyLogits._make(
        root, (), root.hidden, root.vocab_dim, first._form, root.stand_in, tracked=first.requires_grad
    )
    changed = whole.derive(Operation(lambda x: x, of_rows=functools.partial(through, first._operations)))
    return changed.derive(joined_parts, vocab_dim=len(tokens), cls=type(first), terms=first._terms)


def _is_selection(part: Any) -> bool:
    """Whether these are some tokens of which nothing is of their own."""
    return (
        isinstance(part, LazyLogits | LazyTerms)
        and part._vocab_dim == part.dim() - 1
        and part._root.vocab_dim == part._root.stand_in.dim() - 1
        and part._form.temperature is None
        and not part._terms.tensors
        and not any(step.is_per_token for step in part._operations)
    )


def _is_alike(part: Lazy, other: Lazy) -> bool:
    """Whether the same was done to both, with the same gradients."""
    same = part._terms == other._terms and part._form.is_same(other._form) and root_now(part) is root_now(other)
    return same and part.dtype == other.dtype and part.requires_grad == other.requires_grad
