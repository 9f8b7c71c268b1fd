"""Where the gradient of the head's weight goes: added to an existing tensor, or returned to autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.tracing import is_recorded

__all__ = ["Destination", "destination", "has_own_dispatch", "leaf_to_keep", "main_grad_mismatch"]


class Destination(NamedTuple):
    """Whether a backward computes the gradient of the weight, and where it goes."""

    formed: bool  # whether it is computed
    sum: Tensor | None = None  # (V, D) that the gradient is added to; None: it is returned


def has_own_dispatch(weight: Tensor) -> bool:
    """Whether ``weight`` is traced, or of a class with its own ``__torch_dispatch__``."""
    own, plain = type(weight), Tensor
    return own.__torch_dispatch__ is not plain.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]


def leaf_to_keep(weight: Tensor, accumulate_into: str | None) -> Tensor | None:
    """The weight itself, which has ``grad`` and ``main_grad``: a saved weight may be unpacked as another object."""
    accumulates = accumulate_into is not None and weight.requires_grad and weight.is_leaf
    return weight if accumulates and not has_own_dispatch(weight) else None


def destination(
    leaf: Tensor | None,  # (V, D) from `leaf_to_keep`
    saved: Tensor,  # (V, D) as the backward unpacked it
    accumulate_into: str | None,
    needed: bool,
) -> Destination:
    """Where the running backward puts the gradient of the weight.

    It is added only if this backward accumulates into the weight: ``torch.autograd.grad`` gets it returned, and a
    backward with other ``inputs`` does not compute it.
    """
    if not needed or accumulate_into is None:
        return Destination(needed)
    into_main = accumulate_into == "main_grad"
    if leaf is None or has_own_dispatch(saved) or is_recorded():
        if into_main:
            raise RuntimeError(
                "options.accumulate_into='main_grad': linear_weight is traced or no leaf, there is nothing to add to"
            )
        return Destination(True)
    accumulates = _accumulates(leaf)
    if not accumulates:
        return Destination(accumulates is None)
    if not into_main:
        grad = leaf.grad
        is_returned = grad is None or grad.layout != torch.strided or torch.is_grad_enabled()
        return Destination(True, None if is_returned else grad)
    if torch.is_grad_enabled():
        raise RuntimeError("options.accumulate_into='main_grad' has no second derivatives: not with create_graph=True")
    mismatch = main_grad_mismatch(leaf)
    if mismatch is not None:
        raise RuntimeError(mismatch)
    main_grad: Tensor = leaf.main_grad  # type: ignore[attr-defined]  # set by the framework
    return Destination(True, main_grad)


def main_grad_mismatch(weight: Tensor) -> str | None:
    """Why no gradient can be added to ``weight.main_grad``; None if one can."""
    total = getattr(weight, "main_grad", None)
    was = f"a {type(total).__name__}" if total is not None else "None"
    if isinstance(total, Tensor):
        alike = total.shape == weight.shape and total.device == weight.device and total.layout == torch.strided
        if alike and total.is_floating_point():
            return None
        was = f"{total.layout} {total.dtype} {tuple(total.shape)} on {total.device}"
    return (
        "options.accumulate_into='main_grad' needs linear_weight.main_grad, a dense floating-point tensor on "
        f"{weight.device} of shape {tuple(weight.shape)}, was {was}"
    )


def _accumulates(leaf: Tensor) -> bool | None:
    """Whether the running backward accumulates into ``leaf``; None where it returns the gradient to its caller."""
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "leaf node" not in str(error):
            raise
        return None  # torch.autograd.grad asks for this gradient
