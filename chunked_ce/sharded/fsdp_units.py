"""Sharded rows beside FSDP2: units that ``fully_shard`` passes over.

A module with rows on a device mesh becomes a unit of FSDP2 of its own, without parameters to gather. ``fully_shard`` of
a module around it passes over units that exist, so that the rows need not be named in ``ignored_params``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from chunked_ce.lazy.classes import joined
from chunked_ce.parallel.fsdp import parameter_groups
from chunked_ce.sharded.mesh import MeshSharding
from chunked_ce.sharded.rows import rows_in, shardings_of

__all__ = ["RowsUnit", "check_units", "compute_dtype", "make_unit", "refuse_management", "undo_unit"]

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_PLAIN = "_class_before_unit"
_CHECKED = "_unit_is_checked"
_MANAGED = "_is_fsdp_managed_module"  # what FSDP, both versions, sets on modules whose parameters it takes over


class RowsUnit(_Module):
    """Goes before the class that FSDP2 gives to a module with sharded rows."""

    _orig_cls_mro_index = 4  # where FSDP2 finds the module's own class

    def unshard(self, async_op: bool = False) -> NoReturn:
        raise NotImplementedError(
            "the rows of a sharded head, and of embeddings tied to it, are never gathered: LMHead.unwrap(model) makes "
            "them whole, and get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) copies them"
        )

    def set_gradient_divide_factor(self, factor: float) -> None:
        """As in other units of FSDP2: gradients are divided by ``factor`` and not by the number of ranks."""
        for sharding in _mesh_shardings(self):
            object.__setattr__(sharding.vocab, "row_gradient_factor", sharding.mesh.size() / factor)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        plain: type[nn.Module] = vars(self)[_PLAIN]
        copied = memo[id(self)] = plain.__new__(plain)
        left_out = (*_composable_keys(), _CHECKED)
        vars(copied).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in left_out})
        make_unit(copied)
        return copied


def make_unit(module: nn.Module) -> None:
    """Make a module whose parameters are DTensors on one mesh a unit of FSDP2; others stay as they are."""
    shardings = _mesh_shardings(module)
    if not shardings or isinstance(module, RowsUnit):
        return
    from torch.distributed.fsdp import fully_shard

    vars(module)[_PLAIN] = type(module)
    fully_shard(module, mesh=shardings[0].mesh, ignored_params=set(module.parameters(recurse=False)))
    state = _fsdp_state(module)
    # There is nothing to do around a call, and a unit that runs before the model would take itself for the root.
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    module.__class__ = joined(RowsUnit, type(module))


def undo_unit(module: nn.Module) -> None:
    if not isinstance(module, RowsUnit):
        return
    from torch.distributed._composable_state import _module_state_mapping

    module.__class__ = vars(module).pop(_PLAIN)
    for key in (*_composable_keys(), _CHECKED):
        vars(module).pop(key, None)
    _module_state_mapping.pop(module, None)


def check_units(module: nn.Module) -> None:
    """Raise ``ValueError`` unless FSDP2 averages over the ranks that share the rows; in a call of the model."""
    if not isinstance(module, RowsUnit):
        return
    for _, parameter, sharding in rows_in(module):
        sharding.refresh(parameter)
    if vars(module).get(_CHECKED):
        return
    mesh = _mesh_shardings(module)[0].mesh
    meshes = [group.mesh_info.mesh for state in _states_around(module) for group in parameter_groups(state)]
    if meshes and mesh not in meshes:
        raise ValueError(
            f"group_or_mesh of LMHead.shard must be the mesh of fully_shard, {meshes[0]}, also in the names of its "
            f"dimensions, for gradients to be averaged over the same ranks and clipped together, was {mesh}"
        )
    vars(module)[_CHECKED] = bool(meshes)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which the ``MixedPrecisionPolicy`` of the model around a unit lets it compute, if there is one."""
    states = _states_around(module) if isinstance(module, RowsUnit) else []
    dtype: torch.dtype | None = states[0]._mp_policy.param_dtype if states else None
    return dtype


def refuse_management(name: str) -> None:
    """Raise ``RuntimeError`` where FSDP marks a module with sharded rows as one whose parameters it shards."""
    if name == _MANAGED:
        raise RuntimeError(
            "FSDP would take the rows of a sharded head for whole parameters, the same on every rank: give "
            "LMHead.shard the DeviceMesh that fully_shard gets, LMHead.shard(model, mesh), and fully_shard leaves the "
            "rows alone. FullyShardedDataParallel, the older FSDP, does not take models with a sharded head"
        )


def _states_around(module: nn.Module) -> list[Any]:
    """The states of all units of the model, the root's first, once it has been called; else none."""
    states: list[Any] = _fsdp_state(module)._state_ctx.all_states
    return states


def _fsdp_state(module: Any) -> Any:
    return module._get_fsdp_state()


def _mesh_shardings(module: nn.Module) -> list[MeshSharding]:
    return [one for one in shardings_of(module).values() if isinstance(one, MeshSharding)]


def _composable_keys() -> tuple[str, str]:
    """Under which a module keeps what composable APIs know of it."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return STATE_KEY, REGISTRY_KEY
