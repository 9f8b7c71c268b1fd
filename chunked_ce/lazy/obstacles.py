"""Why a head computes its logits at once: something must see them now, or a loss cannot be taken later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from chunked_ce.lazy.colwise import has_forward_of_a_style, is_a_styles, sharding_of
from chunked_ce.lazy.head import LazyHead
from chunked_ce.parallel.dtensors import is_dtensor

__all__ = ["Obstacle", "is_fsdp_unit", "obstacle_of_call", "obstacle_of_head"]

# Their hooks gather a module's parameters, or say where the graph keeps its tensors, and so belong around the loss as
# well as around the logits.
_ENGINES = ("deepspeed.", "torch.distributed.fsdp.", "trl.models.activation_offloading.")


class Obstacle(NamedTuple):
    """Why a head computes its logits at once, and a sentence that says what to do about it."""

    why: str
    remedy: str

    def put_on(self, head: LazyHead) -> None:
        """Let all calls of ``head`` meet this obstacle."""
        vars(head)["_obstacle"] = self

    @staticmethod
    def take_off(head: LazyHead) -> None:
        del vars(head)["_obstacle"]


_REPLACED = Obstacle(
    "its forward has been replaced",
    "Give it back its own forward, and let LMHead.wrap come before what replaces one",
)
_PARAMETRIZED = Obstacle(
    "its weight is parametrized or pruned",
    "Make the weight a parameter again: torch.nn.utils.parametrize.remove_parametrizations(head, 'weight'), or "
    "torch.nn.utils.prune.remove(head, 'weight')",
)
_NO_TENSOR = Obstacle(
    "it is called with something else than one tensor",
    "Call it with the hidden states alone: head(hidden)",
)
_TRANSFORMED = Obstacle(
    "something must see them at once: a transform of its call",
    "Take the loss by chunked_ce.linear_cross_entropy(hidden, head.weight, target) inside of the transform",
)
_TRACED = Obstacle(
    "its call is traced",
    "Take the loss by chunked_ce.linear_cross_entropy(hidden, head.weight, target) in what is traced",
)


def obstacle_of_call(head: LazyHead, hidden: Any) -> Obstacle | None:
    """Why a call of ``head`` with ``hidden`` must compute its logits at once; None if they can wait."""
    return _obstacle_of_all_calls(head) or _obstacle_of_input(head, hidden) or _obstacle_around()


def obstacle_of_head(head: LazyHead) -> str | None:
    """The same for all calls, in words."""
    found = _obstacle_of_all_calls(head)
    return None if found is None else found.why


def _obstacle_of_all_calls(head: LazyHead) -> Obstacle | None:
    layout = head.layout
    put_on: Obstacle | None = vars(head).get("_obstacle")
    if put_on is not None:
        return put_on
    if type(head).forward is not LazyHead.forward or ("forward" in vars(head) and not has_forward_of_a_style(head)):
        return _REPLACED
    if head.own_parameters()[0] is None:
        return _PARAMETRIZED
    if layout is None and is_dtensor(head.own_parameters()[0]) and not is_fsdp_unit(head):
        return _how_it_must_be_sharded(head)
    hook = next((hook for hook in _hooks(head) if not _is_engines(hook)), None)
    if hook is None:
        return None
    return Obstacle(
        f"something must see them at once: a hook on the head, {getattr(hook, '__qualname__', repr(hook))}",
        "Remove the hook, or hang it on a module around the head, where it gets the lazy logits",
    )


def _obstacle_of_input(head: LazyHead, hidden: Any) -> Obstacle | None:
    if not isinstance(hidden, Tensor):
        return _NO_TENSOR
    layout = head.layout
    is_plain = type(hidden) in (Tensor, nn.Parameter) and hidden.shape[-1:] == (head.in_features,)
    is_taken = is_plain if layout is None else layout.takes(hidden)
    if not is_taken and layout is not None and is_dtensor(head.own_parameters()[0]):
        return _how_it_must_be_sharded(head)
    if not is_taken or not hidden.is_floating_point() or hidden.is_meta:
        return Obstacle(
            f"it is called with a {type(hidden).__name__} of shape {tuple(hidden.shape)} and {hidden.dtype}",
            f"Call it with a plain floating-point tensor (..., {head.in_features})",
        )
    return None


def _obstacle_around() -> Obstacle | None:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _TRANSFORMED
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return _TRACED
    return None


def _how_it_must_be_sharded(head: LazyHead) -> Obstacle:
    return Obstacle(
        f"the head {sharding_of(head)}: losses are taken in chunks where ColwiseParallel shards it, with "
        "output_layouts Replicate() or Shard(-1)",
        "Shard the head so",
    )


def _hooks(head: nn.Module) -> Iterator[Callable[..., object]]:
    """The hooks around a call of this module, those of all modules among them."""
    for kind in ("forward_pre_hooks", "forward_hooks", "backward_hooks", "backward_pre_hooks"):
        yield from getattr(head, f"_{kind}").values()
        yield from getattr(nn.modules.module, f"_global_{kind}").values()


def _is_engines(hook: Callable[..., object]) -> bool:
    return f"{getattr(hook, '__module__', None)}.".startswith(_ENGINES) or is_a_styles(hook)


def is_fsdp_unit(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
