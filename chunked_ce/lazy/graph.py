"""The autograd graph of a tensor without values.

A lazy tensor is the output of `attach(hidden, ...)`, so that whatever walks the graph or hangs hooks on it (engines do
so with everything a forward returns) finds the hidden states and the head behind it. `detour(lazy, hidden)` gives
hidden states whose gradient passes through that graph: it is wrapped as a `HiddenGradient`, which takes the place of
the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["HiddenGradient", "attach", "detour", "is_attached"]

_Made = TypeVar("_Made", bound=Tensor)

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.view_as.default}


class HiddenGradient(Tensor):
    """The gradient of lazy logits as autograd sees it, in their shape and dtype; holds that of the hidden states."""

    hidden: Tensor
    like: tuple[torch.Size, torch.dtype, torch.device]

    @staticmethod
    def __new__(cls, like: tuple[torch.Size, torch.dtype, torch.device], hidden: Tensor) -> HiddenGradient:
        shape, dtype, device = like
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.hidden, self.like = hidden, like
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"HiddenGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in _SAME:
            return cls(args[0].like, args[0].hidden)
        if function is _aten.add.Tensor and not kwargs and all(isinstance(a, cls) for a in args):
            return cls(args[0].like, args[0].hidden + args[1].hidden)
        if function is _aten.isnan.default:  # called by torch's anomaly detection
            return args[0].hidden.isnan()
        raise RuntimeError(
            f"chunked_ce: {function} on the gradient of lazy logits, which is never formed. For the gradient of the "
            "logits themselves call materialize() on the logits first, and go on with what it returns"
        )


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[[], Tensor],
        differentiate: Callable[[Tensor], list[Tensor | None]],
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.parameters = len(parameters)
        ctx.differentiate = differentiate
        ctx.set_materialize_grads(False)
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rest = [None] * ctx.parameters
        if grad is None:
            return None, None, None, *rest
        if isinstance(grad, HiddenGradient):
            return None, None, grad.hidden, *rest
        return None, None, *ctx.differentiate(grad)  # from a function that took the logits themselves


class _Detour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lazy: Tensor, hidden: Tensor) -> Tensor:
        ctx.like = (lazy.shape, lazy.dtype, lazy.device)
        ctx.set_materialize_grads(False)
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if grad is None else HiddenGradient(ctx.like, grad), None


def attach(
    make: Callable[[], _Made],
    differentiate: Callable[[Tensor], list[Tensor | None]],
    hidden: Tensor,
    *parameters: Tensor,
) -> _Made:
    """The tensor that ``make`` makes, with ``hidden`` and ``parameters`` behind it in the graph.

    ``differentiate(grad)`` gives their gradients, should a gradient of the values arrive after all.
    """
    made: _Made = _Attach.apply(make, differentiate, hidden, *parameters)  # type: ignore[no-untyped-call]
    return made


def is_attached(node: torch.autograd.graph.Node | None) -> bool:
    """Whether this is the node of a tensor that has not changed since `attach` returned it."""
    return node is None or isinstance(node, _Attach._backward_cls)


def detour(lazy: Tensor, hidden: Tensor) -> Tensor:
    """``hidden``, with a gradient that passes through the graph of ``lazy``."""
    found: Tensor = _Detour.apply(lazy, hidden.detach())  # type: ignore[no-untyped-call]
    return found
