"""Parameters that FSDP shards over data ranks: such a shard is not a shard of the vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["fsdp_refusal", "gradient_factor", "is_flattened", "is_fsdp_shard", "parameter_groups"]

_WHAT_TO_DO = (
    "take the loss inside the forward of a module that FSDP shards, or swap the head with LMHead.wrap(model) and make "
    "it a unit of its own (fully_shard(model.lm_head)), or unshard it around loss and backward (head.unshard()); or "
    "leave it sharded and let the ranks share their tokens: LMHead.shard(model, mesh) before fully_shard, or "
    "vocab=VocabShard.from_dtensor(weight, tokens='own')"
)
_NODES = 32  # searched in the graph between a parameter and a head computed from it, by a cast for instance


def is_fsdp_shard(tensor: Tensor) -> bool:
    """Whether a DTensor is a parameter that ``fully_shard`` sharded, a view of it or computed from it."""
    shards = [shard for group in _groups() for shard in _shards_of(group)]
    if not shards:
        return False
    identities = {id(shard) for shard in shards}
    memories = {_memory(shard) for shard in shards}
    candidates = [tensor, *_leaves(tensor)]
    return any(id(one) in identities or _memory(one) in memories for one in candidates)


def fsdp_refusal(name: str, tensor: Any) -> str:
    return (
        f"{name} is sharded by FSDP over data ranks, which hold different tokens: it is no shard of the vocabulary, "
        f"had placements {tuple(tensor.placements)}. FSDP has to have it whole: {_WHAT_TO_DO}"
    )


def gradient_factor(tensor: Any) -> float:
    """The number of ranks over ``set_gradient_divide_factor`` of the unit that shards a parameter; 1 if not set."""
    for group in _groups():
        factor = group.gradient_divide_factor
        if factor is not None and any(_memory(tensor) == _memory(shard) for shard in _shards_of(group)):
            return float(tensor.device_mesh.size() / factor)
    return 1.0


def is_flattened(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that ``FullyShardedDataParallel`` keeps in a flat parameter."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def _groups() -> Iterator[Any]:
    """The groups of parameters of all modules that ``fully_shard`` has sharded."""
    # There are none before this module, which is slow to import, is imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    composable = sys.modules.get("torch.distributed._composable_state")
    if fsdp is None or composable is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in list(composable._module_state_mapping):
        if isinstance(module, fsdp.FSDPModule):
            yield from parameter_groups(module._get_fsdp_state())


def _shards_of(group: Any) -> Iterator[Tensor]:
    """The parameters of a group as ``fully_shard`` keeps them while they are sharded."""
    for parameter in group.fsdp_params:
        yield parameter.sharded_param
        if parameter.sharded_state.name == "SHARDED":  # `load_state_dict` or `to` may have replaced it
            registered = parameter._module_info.module._parameters.get(parameter._module_info.param_name)
            if registered is not None:
                yield registered


def parameter_groups(state: Any) -> list[Any]:
    """The groups of parameters that a unit of FSDP2 gathers together."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older versions have one
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def _memory(tensor: Tensor) -> int:
    """The identity of a tensor's memory, even where it is empty."""
    memory: int = getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata
    return memory


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from, within a few nodes of the graph."""
    leaves: list[Tensor] = []
    nodes = [tensor.grad_fn]
    for _ in range(_NODES):
        if not nodes:
            break
        node = nodes.pop(0)
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        else:
            nodes += [following for following, _ in node.next_functions]
    return leaves
