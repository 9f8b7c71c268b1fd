"""Heads whose values an engine that shards parameters has released, leaving an empty shape or empty memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from chunked_ce.parallel.fsdp import is_flattened
from chunked_ce.tracing import is_recorded

__all__ = ["check_head_still_there", "is_released", "where_it_is_whole"]

# The parts of a head that an engine may put away, as arguments.
_PARAMETERS = {"weight": "linear_weight", "bias": "linear_bias", "adapter_weight": "linear_adapter[1]"}


def is_released(tensor: Tensor) -> bool:
    """Whether the memory of a tensor was released, although it keeps its shape."""
    if is_recorded() or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta":
        return False
    if is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def where_it_is_whole(tensor: Tensor) -> str:
    """For an error: which engine has released a head, and where the user has it whole."""
    if is_flattened(tensor) or is_released(tensor):
        return (
            "FSDP shards this one, and has it whole only inside the forward of the module that it wraps: call the loss "
            "inside it (pass the targets to the model), or swap the head with LMHead.wrap(model), or with "
            "FullyShardedDataParallel.summon_full_params(model) around the loss, for its value alone"
        )
    partitioned = " (this one is partitioned by DeepSpeed)" if hasattr(tensor, "ds_id") else ""
    return (
        f"Under ZeRO-3 a parameter holds no elements outside the engine's forward{partitioned}: call the loss inside "
        "it, or put loss and backward both into one block of deepspeed.zero.GatheredParameters"
    )


def check_head_still_there(
    parts: Sequence[str], tensors: Sequence[Tensor | None], shapes: Sequence[torch.Size], *, is_read: bool
) -> None:
    """Raise in a backward unless it finds the parameters of a head, by the names of its ``parts``, as the forward left
    them."""
    for part, tensor, shape in zip(parts, tensors, shapes, strict=True):
        if part in _PARAMETERS:
            _check_still_there(_PARAMETERS[part], tensor, shape, is_read=is_read)


def _check_still_there(name: str, tensor: Tensor | None, shape: torch.Size, *, is_read: bool) -> None:
    """Raise in a backward unless a tensor has the shape of the forward, and still has values if it ``is_read``."""
    if tensor is None or is_recorded() or (tensor.shape == shape and not (is_read and is_released(tensor))):
        return
    now = "has given back its memory" if tensor.shape == shape else f"has shape {tuple(tensor.shape)}"
    raise RuntimeError(
        f"{name} had shape {tuple(shape)} in the forward and {now} in the backward: an engine has put it away in "
        f"between. {where_it_is_whole(tensor)}"
    )
