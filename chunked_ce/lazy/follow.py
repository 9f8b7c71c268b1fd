"""What is done to lazy tensors, function by function: followed, answered from the hidden states, or computed.

A handler returns ``NotImplemented`` for arguments that it cannot follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from chunked_ce.engine.tracing import not_compiled
from chunked_ce.lazy.graph import HiddenGradient
from chunked_ce.lazy.logits import Lazy

__all__ = ["dispatch", "follows", "functions", "is_followed"]

_QUERIES: set[Callable] = set()
_FOLLOWED: dict[Callable, tuple[Callable, inspect.Signature]] = {}
_OF_COMPUTED: set[Callable] = set()


@not_compiled
def dispatch(function: Callable, args: tuple, kwargs: dict) -> Any:
    """``function`` of arguments with a lazy tensor among them."""
    if function in _QUERIES:
        return _query(function, args, kwargs)
    if function in (torch.autograd.backward, torch.autograd.grad):
        return _differentiate(function, args, kwargs)
    if function in _FOLLOWED:
        handler, signature = _FOLLOWED[function]
        if function in _COMMUTATIVE and len(args) == 2 and not isinstance(args[0], Lazy):
            args = args[::-1]
        try:
            bound = _bind(signature, args, kwargs)
        except TypeError:
            return _compute(function, args, kwargs)
        first = next(iter(bound.arguments.values()))
        followed = isinstance(first, Lazy) and (not first.is_computed or handler in _OF_COMPUTED)
        if followed and not torch._C._are_functorch_transforms_active():
            first.join_graph()  # before a handler reads the hidden states
            result = handler(*bound.args, **bound.kwargs)
            if result is not NotImplemented:
                return result
    return _compute(function, args, kwargs)


def functions(names: str, *spaces: Any) -> list[Callable]:
    """The functions of these names in torch.Tensor and torch, or in ``spaces``."""
    spaces = spaces or (torch.Tensor, torch)
    return [getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name)]


# Names by which torch takes the same argument, NumPy's among them.
_ALIASES = {
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
    "x2": "other",
    "split_size_or_sections": "split_size",
}
_COMMUTATIVE = set(functions("mul multiply __mul__ __rmul__"))
_FIRST = ("input", "self", "tensor", "x", "a", "x1")


def _bind(signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """The arguments as a handler takes them, by whatever names the caller gave them."""
    kwargs = {name if name in signature.parameters else _ALIASES.get(name, name): v for name, v in kwargs.items()}
    first, second = (*signature.parameters.values(), None)[:2]
    if not args and first.name not in kwargs:
        args = tuple(kwargs.pop(name) for name in _FIRST if name in kwargs)
    if second is not None and second.kind is second.VAR_POSITIONAL and second.name in kwargs:
        args = (*args, kwargs.pop(second.name))
    return signature.bind(*args, **kwargs)


def follows(names: str, *spaces: Any, computed: bool = False) -> Callable[[Callable], Callable]:
    """The decorated handler answers for these functions; with ``computed`` even once the logits are computed."""

    def register(handler: Callable) -> Callable:
        for function in functions(names, *spaces):
            _FOLLOWED[function] = (handler, inspect.signature(handler))
        if computed:
            _OF_COMPUTED.add(handler)
        return handler

    return register


def is_followed(function: Callable) -> bool:
    """Whether there are arguments for which ``function`` needs no logits."""
    return function in _FOLLOWED or function in _QUERIES


def _compute(function: Callable, args: tuple, kwargs: dict) -> Any:
    """``function`` of the logits themselves."""
    lazy = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Lazy)]
    for one in lazy:
        one.compute_for(_name(function))

    def value(x: Any) -> Any:
        return x.materialize() if isinstance(x, Lazy) else x

    result = function(*tree_map(value, args), **tree_map(value, kwargs))
    # In place, or nothing was to be done.
    return next((one for one in lazy if result is one.materialize()), result)


def _differentiate(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Derivatives of lazy tensors by way of their values, or, in a checkpoint's backward, of the hidden states."""
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


def _name(function: Callable) -> str:
    name = getattr(function, "__name__", str(function))
    owner = getattr(function, "__self__", None)
    return f"Tensor.{owner.__name__}" if name in ("__get__", "__set__", "__delete__") and owner is not None else name


# ---- questions that the tensor without values answers ----

_NOT_ANSWERED = ["data", "T", "mT", "H", "mH", "real", "imag", "volatile"]
_HOOKS = set(functions("register_hook retain_grad", torch.Tensor))


def _query(function: Callable, args: tuple, kwargs: dict) -> Any:
    computed = [x for x in args if isinstance(x, Lazy) and x.is_computed]
    if computed:  # the values have a graph of their own, and may have changed since
        result = function(*tree_map(lambda x: x.materialize() if isinstance(x, Lazy) else x, args), **kwargs)
        return next((one for one in computed if result is one.materialize()), result)
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)
    if function in _HOOKS:
        args[0].hook_added()
    return result


def _attributes() -> list[Callable]:
    found = {name: inspect.getattr_static(Tensor, name) for name in dir(Tensor) if name not in _NOT_ANSWERED}
    kinds = [value for value in found.values() if inspect.isgetsetdescriptor(value)]
    return [getattr(value, name) for value in kinds for name in ("__get__", "__set__")]


_QUERIES.update(_attributes())
_QUERIES.discard(Tensor.requires_grad.__set__)  # a leaf of one's own making holds values
_QUERIES.update(functions("grad", Tensor) and [inspect.getattr_static(Tensor, "grad").__get__])
_QUERIES.update(_HOOKS)
_QUERIES.update(
    functions(
        "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex is_signed element_size "
        "get_device storage_offset is_same_size is_inference __len__ __hash__ has_names is_conj is_neg "
        "result_type"
    )
)

Lazy._dispatch = staticmethod(dispatch)
