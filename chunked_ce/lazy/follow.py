"""Dispatch of the functions that are called on lazy tensors.

A handler that `follows` a function answers without the logits, or returns None for arguments that it cannot follow.
Everything without an answer is computed from the logits themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from chunked_ce.lazy.activity import during, name_of
from chunked_ce.lazy.graph import HiddenGradient
from chunked_ce.lazy.logits import Lazy, LazyMixture
from chunked_ce.tracing import not_compiled

__all__ = ["dispatch", "follows", "functions", "is_followed"]


_Function = Callable[..., Any]
_Followed = TypeVar("_Followed", bound=_Function)


class _Handler(NamedTuple):
    answer: _Function
    signature: inspect.Signature
    computed: bool  # whether it answers even once the logits are computed
    either: bool  # whether another argument than the first may be the lazy one


_QUERIES: set[_Function] = set()
_FOLLOWED: dict[_Function, _Handler] = {}
_FOLLOWED_OF_MIXTURES: dict[_Function, _Handler] = {}


@not_compiled
def dispatch(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function`` of arguments with a lazy tensor among them."""
    if function in _QUERIES:
        return _query(function, args, kwargs)
    if function in (torch.autograd.backward, torch.autograd.grad):
        return _differentiate(function, args, kwargs)
    lazy = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Lazy)]
    if any(one.is_behind for one in lazy):
        return _compute(function, args, kwargs)
    mixed = any(isinstance(one, LazyMixture) for one in lazy)
    handler = (_FOLLOWED_OF_MIXTURES if mixed else _FOLLOWED).get(function)
    with during(function):
        result = None if handler is None else _follow(handler, function, args, kwargs)
        return _compute(function, args, kwargs) if result is None else result


def _follow(handler: _Handler, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The answer of the function's handler."""
    if function in _COMMUTATIVE and len(args) == 2 and not isinstance(args[0], Lazy):
        args = args[::-1]
    try:
        bound = _bind(handler.signature, args, kwargs)
    except TypeError:
        return None
    first = next(iter(bound.arguments.values()))
    found = tree_flatten((bound.args, bound.kwargs))[0] if handler.either else [first]
    lazy = [one for one in found if isinstance(one, Lazy)]
    if not lazy or (any(one.is_computed for one in lazy) and not handler.computed):
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    for one in lazy:
        one.join_graph()  # before the handler reads the hidden states
    return handler.answer(*bound.args, **bound.kwargs)


def functions(names: str, *spaces: Any) -> list[_Function]:
    """The functions with these names in torch.Tensor and torch, or in ``spaces``."""
    spaces = spaces or (torch.Tensor, torch)
    return [getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name)]


# Other names that torch accepts for an argument, NumPy's among them.
_ALIASES = {
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "indices": "sections",
    "keepdims": "keepdim",
    "x2": "other",
    "split_size_or_sections": "split_size",
}
_COMMUTATIVE = set(functions("mul multiply __mul__ __rmul__ add __add__ __radd__"))
_FIRST = ("input", "self", "tensor", "x", "a", "x1")


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Bind the arguments to a handler's parameters, by whatever names the caller gave them."""
    kwargs = {name if name in signature.parameters else _ALIASES.get(name, name): v for name, v in kwargs.items()}
    first, *others = signature.parameters.values()
    second = others[0] if others else None
    if not args and first.name not in kwargs:
        args = tuple(kwargs.pop(name) for name in _FIRST if name in kwargs)
    if second is not None and second.kind is second.VAR_POSITIONAL and second.name in kwargs:
        args = (*args, kwargs.pop(second.name))
    return signature.bind(*args, **kwargs)


def follows(
    names: str, *spaces: Any, computed: bool = False, either: bool = False, mixtures: bool = False
) -> Callable[[_Followed], _Followed]:
    """Register a handler for these functions; with ``computed`` it answers even once the logits are computed, with
    ``either`` also where another argument than the first one is lazy, with ``mixtures`` where one is a mixture."""
    registry = _FOLLOWED_OF_MIXTURES if mixtures else _FOLLOWED

    def register(handler: _Followed) -> _Followed:
        for function in functions(names, *spaces):
            registry[function] = _Handler(handler, inspect.signature(handler), computed, either)
        return handler

    return register


def is_followed(function: _Function) -> bool:
    """Whether ``function`` needs no logits, at least for some arguments."""
    return function in _FOLLOWED or function in _QUERIES


def _compute(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function`` of the logits themselves."""
    lazy = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Lazy)]
    for one in lazy:
        one.compute_for(name_of(function))
    return _of_values(function, args, kwargs, lazy)


def _of_values(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], lazy: list[Lazy]) -> Any:
    """``function`` of the values; one of the ``lazy`` tensors if it returns that tensor's values themselves."""

    def value(x: Any) -> Any:
        return x.materialize() if isinstance(x, Lazy) else x

    result = function(*tree_map(value, args), **tree_map(value, kwargs))
    return next((one for one in lazy if result is one.materialize()), result)


def _differentiate(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Differentiate lazy tensors through their values; in a checkpoint's backward, through the hidden states."""
    if any(isinstance(x, HiddenGradient) for x in tree_flatten((args, kwargs))[0]):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    by = kwargs.get("inputs", args[1] if function is torch.autograd.grad and len(args) > 1 else None)
    if any(isinstance(x, Lazy) and not x.is_computed for x in tree_flatten(by)[0]):
        raise RuntimeError(
            "the gradient of lazy logits is never formed: call materialize() on them before the loss, and take the "
            "loss and the gradient of what it returns"
        )
    return _compute(function, args, kwargs)


# ---- questions that need no values ----

_NOT_ANSWERED = ["data", "T", "mT", "H", "mH", "real", "imag", "volatile"]
_HOOKS = set(functions("register_hook retain_grad", torch.Tensor))


def _query(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    computed = [x for x in args if isinstance(x, Lazy) and x.is_computed]
    values_only = not computed and (args[0].is_behind or any(step.is_per_token for step in args[0]._operations))
    if function in _HOOKS and values_only:
        return _compute(function, args, kwargs)
    if computed:  # the values have a graph of their own, and may have changed since
        return _of_values(function, args, kwargs, computed)
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)
    if function in _HOOKS:
        args[0]._hooked = True
    return result


def _attributes() -> list[_Function]:
    found = {name: inspect.getattr_static(Tensor, name) for name in dir(Tensor) if name not in _NOT_ANSWERED}
    kinds = [value for value in found.values() if inspect.isgetsetdescriptor(value)]
    return [getattr(value, name) for value in kinds for name in ("__get__", "__set__")]


_QUERIES.update(_attributes())
# A tensor that becomes a leaf must hold values.
_QUERIES.discard(inspect.getattr_static(Tensor, "requires_grad").__set__)
_QUERIES.update(_HOOKS)
_QUERIES.update(
    functions(
        "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex is_signed element_size "
        "get_device storage_offset is_same_size is_inference __len__ __hash__ has_names is_conj is_neg "
        "result_type"
    )
)

Lazy._dispatch = staticmethod(dispatch)
