"""DistributedDataParallel leaves parameters alone that differ between its ranks: their names on each possible root."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from chunked_ce.sharded.rows import rows_in, shardings_of
from chunked_ce.tracing import run_as_written

__all__ = ["check_not_averaged", "follow_parent", "leave_rows_alone"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class IgnoredNames:
    """The names that `DistributedDataParallel` shall leave alone if ``module`` is its root.

    The names are those at the time of asking: adapters put modules around others later.
    """

    def __init__(self, module: nn.Module, others: Any = ()) -> None:
        self._module, self._others = module, list(others)

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        for prefix, module in self._module.named_modules(remove_duplicate=False):
            for name in shardings_of(module):
                yield f"{prefix}.{name}" if prefix else name

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def leave_rows_alone(model: nn.Module) -> None:
    """Name the sharded parameters on every module of ``model`` that holds one, since any can be the root."""
    for module in model.modules():
        if any(map(shardings_of, module.modules())):
            _name_ignored(module)


def _name_ignored(module: nn.Module) -> None:
    before = vars(module).get(_IGNORED, ())
    if not isinstance(before, IgnoredNames):
        vars(module)[_IGNORED] = IgnoredNames(module, before)  # a module that is being built may have no `__setattr__`


def forget_names(model: nn.Module) -> None:
    """Undo `leave_rows_alone` where no sharded parameter is left."""
    for module in model.modules():
        names = vars(module).get(_IGNORED)
        if isinstance(names, IgnoredNames) and not any(map(shardings_of, module.modules())):
            del vars(module)[_IGNORED]
            if names._others:
                vars(module)[_IGNORED] = names._others


@run_as_written
def follow_parent(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Runs when a module is put into another, which may become the root then."""
    if module is not None and isinstance(vars(module).get(_IGNORED), IgnoredNames):
        _name_ignored(parent)


nn.modules.module.register_module_module_registration_hook(follow_parent)


def check_not_averaged(module: nn.Module) -> None:
    """Raise ``RuntimeError`` if the `DistributedDataParallel` that runs now has taken the rows for the same on all
    ranks, or averages other parameters over other ranks."""
    parallel = sys.modules.get("torch.nn.parallel.distributed")
    engine = getattr(parallel.DistributedDataParallel, "_active_ddp_module", None) if parallel else None
    if engine is None:
        return
    joining = engine._join_config
    if joining.enable and not joining.throw_on_early_termination:
        raise RuntimeError(
            "the join of DistributedDataParallel lets a rank stop before the others, which would wait for it in each "
            "call of a sharded head: let it go on without tokens, or join with throw_on_early_termination=True"
        )
    managed = {id(parameter) for parameter in engine._module_parameters}
    for _, parameter, sharding in rows_in(module):
        if id(parameter) in managed:
            raise RuntimeError(
                "DistributedDataParallel has taken the rows of a sharded head for the same on every rank, and has "
                "overwritten them with those of its first rank: build the model around the sharded one before it goes "
                "into DistributedDataParallel, or call LMHead.shard with the outermost module"
            )
        ranks = dist.get_process_group_ranks(engine.process_group)
        if set(ranks) != set(sharding.ranks):
            raise RuntimeError(
                f"DistributedDataParallel averages over ranks {ranks}, and the head is sharded over ranks "
                f"{sharding.ranks}: both must be the same group"
            )
