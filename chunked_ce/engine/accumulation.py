"""Where the gradient of the head's weight goes: added to a tensor that exists, or returned to autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine.tracing import is_recorded

__all__ = ["Destination", "destination", "has_own_dispatch", "leaf_to_keep", "main_grad_mismatch"]


class Destination(NamedTuple):
    """What a backward does with the gradient of the weight."""

    formed: bool
    sum: Tensor | None = None  # (V, D), which it is added to; None: it is returned


def has_own_dispatch(weight: Tensor) -> bool:
    """Whether ``weight`` is traced, or of a class that computes in its own way."""
    return type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def leaf_to_keep(weight: Tensor, accumulate_into: str | None) -> Tensor | None:
    """The weight for `destination`, as the object that has ``grad`` and ``main_grad``: what is saved may be unpacked
    as another one."""
    wanted = accumulate_into is not None and weight.requires_grad and weight.is_leaf
    return weight if wanted and not has_own_dispatch(weight) else None


def destination(
    leaf: Tensor | None,  # (V, D) from `leaf_to_keep`
    saved: Tensor,  # (V, D) as the backward unpacked it
    accumulate_into: str | None,
    needed: bool,
) -> Destination:
    """Where the running backward is to leave the gradient of the weight.

    Nothing is added unless this backward accumulates into the weight: ``torch.autograd.grad`` gets what it asks for,
    and a backward that was given other ``inputs`` forms no gradient of the weight.
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
        found = leaf.grad
        usual = found is None or found.layout != torch.strided or torch.is_grad_enabled()
        return Destination(True, None if usual else found)
    if torch.is_grad_enabled():
        raise RuntimeError("options.accumulate_into='main_grad' has no second derivatives: not with create_graph=True")
    mismatch = main_grad_mismatch(leaf)
    if mismatch is not None:
        raise RuntimeError(mismatch)
    return Destination(True, leaf.main_grad)


def main_grad_mismatch(weight: Tensor) -> str | None:
    """Why nothing can be added to ``weight.main_grad``, None where it can."""
    found = getattr(weight, "main_grad", None)
    was = f"a {type(found).__name__}" if found is not None else "None"
    if isinstance(found, Tensor):
        alike = found.shape == weight.shape and found.device == weight.device and found.layout == torch.strided
        if alike and found.is_floating_point():
            return None
        was = f"{found.layout} {found.dtype} {tuple(found.shape)} on {found.device}"
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
        return None  # torch.autograd.grad was asked for it
