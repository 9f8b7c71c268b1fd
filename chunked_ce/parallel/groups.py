"""Process groups as arguments: checked, or found again by the ranks that a pickle holds in their place."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d

from chunked_ce.arguments import described

__all__ = ["checked_group", "group_of_ranks"]


def checked_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group; None means all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group must be of torch.distributed, which is not initialised: init_process_group first")
    group = dist.group.WORLD if group is None else group
    # new_group gives a rank that is not in the group a plain int.
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be None or a ProcessGroup that this rank is in, was {described(group)}")
    return group


def group_of_ranks(ranks: list[int], name: str) -> dist.ProcessGroup:
    """This process's group of the world's ``ranks``, in this order; the one called ``name`` if there are several."""
    world = checked_group(None)
    groups = [world, *distributed_c10d._world.pg_map]
    matches = [group for group in groups if dist.get_process_group_ranks(group) == ranks]
    if not matches:
        raise ValueError(
            f"group: a VocabShard that was pickled needs the process group of ranks {ranks}, and this process, rank "
            f"{dist.get_rank()} of {dist.get_world_size()}, is in no such group: make it first, as "
            f"torch.distributed.new_group({ranks})"
        )
    return next((group for group in matches if group.group_name == name), matches[0])
