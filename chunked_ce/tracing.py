"""Marks for the compiler, and whether values may be read: not while operations are recorded to run later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_legacy_batchedtensor

__all__ = [
    "assume_constant",
    "check_values",
    "has_autocast",
    "has_values",
    "is_batched",
    "is_recorded",
    "no_autocast",
    "not_compiled",
    "run_as_written",
    "runs_at_once",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable` that does not import the compiler, which takes seconds, before the first call."""
    wrapper: Any = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    wrapper._torchdynamo_disable = wrapper._torchdynamo_disable_recursive = True
    wrapper._torchdynamo_orig_callable, wrapper._torchdynamo_wrapper_id = function, id(wrapper)
    disabled: _Function = wrapper
    return disabled


def run_as_written(function: _Function) -> _Function:
    """Keep the compiler from a function that eager code calls meanwhile, without importing the compiler.

    Within a graph the function is traced as any other; `not_compiled` would break that graph, and adds a frame.
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def assume_constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result` that does not import the compiler."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@assume_constant
def has_autocast(device_type: str) -> bool:
    """Whether devices have an autocast state; the compiler of torch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off on devices that have it; the meta device does not."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else contextlib.nullcontext()


def is_recorded() -> bool:
    """Whether a compiler or ``make_fx`` records what runs now."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def runs_at_once(*tensors: Tensor) -> bool:
    """Whether operations on ``tensors``, which have values, run when called: nothing records or replaces them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors)


def is_batched(*tensors: Tensor) -> bool:
    """Whether a transform of ``torch.func``, or ``torch.autograd.grad`` with ``is_grads_batched``, wraps a tensor."""
    if torch.compiler.is_compiling():
        return False
    wraps = is_functorch_wrapped_tensor, is_legacy_batchedtensor
    return any(wrapped(tensor) for tensor in tensors for wrapped in wraps)


def has_values(*sizes: int) -> bool:
    """Whether all ``sizes`` are numbers: in a graph with dynamic sizes they are symbols."""
    if not torch.compiler.is_compiling():
        return not any(isinstance(size, torch.SymInt) for size in sizes)
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in sizes)


def check_values(tensor: Tensor, fits: Callable[[Tensor], Tensor], message: str) -> None:
    """``ValueError`` if values of ``tensor`` do not fit; a device-side assertion where the host must not read them."""
    if not torch.compiler.is_compiling():
        tensor = _below_transforms(tensor)
    if not _is_readable(tensor):
        torch._assert_async(fits(tensor).all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif not fits(tensor).all():
        raise ValueError(f"{message}, was a tensor of {tensor.tolist()}")


def _below_transforms(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func`` transforms have wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _is_readable(tensor: Tensor) -> bool:
    """Whether the host may branch on values of ``tensor``: they are in its own memory, and ``tensor`` is no tracer."""
    return tensor.device.type == "cpu" and not is_recorded() and type(tensor) in (Tensor, nn.Parameter)
