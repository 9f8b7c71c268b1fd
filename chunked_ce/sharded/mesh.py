"""Rows over a device mesh, as DTensors: for FSDP2 and HSDP."""

from __future__ import annotations

import dataclasses
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunked_ce.parallel.dtensors import is_dtensor, own_rows
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.sharded.rows import RowSharding

__all__ = ["MeshSharding", "sharding_over"]


@dataclasses.dataclass(frozen=True, eq=False)
class MeshSharding(RowSharding):
    """The rows are sharded over the last dimension of a mesh, and the same along the first one of two.

    The ranks of both have tokens of their own. State dicts hold DTensors, as those of FSDP2 do, and take DTensors or
    whole tensors.
    """

    mesh: Any  # DeviceMesh

    @classmethod
    def over(cls, total: int, group_or_mesh: Any) -> MeshSharding:
        mesh = group_or_mesh
        if mesh.ndim > 2 or (mesh.ndim == 2 and mesh.mesh_dim_names is None):
            raise ValueError(
                "group_or_mesh must be a process group, or a mesh as fully_shard takes it: of one dimension, or of two "
                f"with names, (replicate, shard), was {mesh}"
            )
        return cls(VocabShard.split(total, mesh.get_group(mesh.ndim - 1), tokens="own"), mesh)

    @property
    def has_dtensors(self) -> bool:
        return True

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return [self.mesh.get_group(dim) for dim in reversed(range(self.mesh.ndim))]

    @property
    def ranks(self) -> list[int]:
        ranks: list[int] = self.mesh.mesh.flatten().tolist()
        return ranks

    def parameter(self, rows: Tensor, requires_grad: bool) -> nn.Parameter:
        return nn.Parameter(self._distributed(rows), requires_grad)

    def local(self, parameter: Tensor) -> Tensor:
        return own_rows(parameter, self.vocab)

    def loaded(self, given: Tensor) -> Tensor:
        return given if is_dtensor(given) else self._distributed(self.mine(given))

    def refresh(self, parameter: Tensor) -> None:
        distributed: Any = parameter
        dtype, local = parameter.dtype, distributed._local_tensor
        if local.dtype != dtype:  # ``parameter.data = parameter.data.to(dtype)`` changes only what is around a DTensor
            meta = distributed._spec.tensor_meta._replace(dtype=dtype)
            distributed._spec = dataclasses.replace(distributed._spec, tensor_meta=meta)
            distributed._local_tensor = local.to(dtype)

    def is_saved_whole(self, parameter: Tensor) -> bool:
        return not parameter.is_meta and _is_broadcast_by_accelerate()

    def _distributed(self, rows: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [*[Replicate()] * (self.mesh.ndim - 1), Shard(0)]
        shape = self.whole_shape(rows)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, placements, run_check=False, shape=shape, stride=stride)


def sharding_over(total: int, group_or_mesh: Any) -> RowSharding:
    """``total`` rows over the ranks of a process group or a device mesh; None for all ranks."""
    module = sys.modules.get("torch.distributed.device_mesh")
    is_mesh = module is not None and isinstance(group_or_mesh, module.DeviceMesh)
    return (MeshSharding if is_mesh else RowSharding).over(total, group_or_mesh)


def _is_broadcast_by_accelerate() -> bool:
    """Whether Accelerate asks for the state dict of which it broadcasts rank 0's (``cpu_ram_efficient_loading``).

    It takes the local part of a DTensor in it for the whole, and puts the model on the meta device afterwards.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "fsdp2_prepare_model":
            return bool(frame.f_locals["fsdp2_plugin"].cpu_ram_efficient_loading)
        frame = frame.f_back
    return False
