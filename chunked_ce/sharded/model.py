"""Spreading a head's parameters, and the embeddings tied to it, over ranks; and gathering them again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from chunked_ce.parallel.checksum import checksum
from chunked_ce.parallel.collectives import exchange
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.fsdp import is_flattened
from chunked_ce.sharded import ddp, state
from chunked_ce.sharded.embedding import ShardedEmbedding, check_can_shard
from chunked_ce.sharded.fsdp_units import undo_unit
from chunked_ce.sharded.optimizers import retire
from chunked_ce.sharded.rows import RowSharding, forget, record, shardings_of
from chunked_ce.tracing import run_as_written

__all__ = ["shard_parameters", "together", "unshard_parameters"]

_Result = TypeVar("_Result")

_RESIZE = "resize_token_embeddings"
_FIRST_UNWRAP = (
    "call LMHead.unwrap(model) on every rank, change the model, resize its embeddings for instance, and call "
    "LMHead.shard again"
)
_TRAINABLE_TOKENS = (
    "PEFT's trainable tokens read rows of the head, or of an embedding tied to it, by their numbers, and a rank of a "
    "sharded head has its own rows only: train the head and what is tied to it, or leave it whole"
)


class Holder(NamedTuple):
    """A place of a parameter in a model."""

    path: str  # of the module
    module: nn.Module
    name: str
    whole: nn.Parameter

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def together(groups: list[dist.ProcessGroup], find: Callable[[], _Result]) -> _Result:
    """What ``find`` returns, unless it raises on some rank: then on every one, also of ranks that share no group."""
    results: list[_Result] = []
    error: Exception | None = None
    try:
        results.append(find())
    except Exception as raised:
        error = raised
    said = None if error is None else str(error)
    for group in groups:
        everyones = exchange(said, group, "chunked_ce: LMHead.shard")
        said = said or next((_of_rank(rank, other) for rank, other in enumerate(everyones) if other is not None), None)
    if error is not None:
        raise error
    if said is not None:
        raise ValueError(said)
    return results[0]


def _of_rank(rank: int, error: str) -> str:
    return f"rank {rank} of the group cannot shard its head: {error}"


def shard_parameters(model: nn.Module, head: nn.Linear, sharding: RowSharding) -> None:
    """Put this rank's rows in the place of the weight and bias of ``head`` and of the embeddings tied to it.

    Raises ValueError on every rank of the group if the parameters differ in shape or dtype between ranks or cannot be
    sharded; nothing is changed then. Where only their values differ, those of the group's first rank are taken.
    """
    holders = _holders(model, head)
    together(sharding.groups, lambda: _check_shardable(model, head, holders))
    _take_alike(head, sharding, len(holders))
    replacements: dict[int, nn.Parameter] = {}
    for holder in holders:
        whole = holder.whole
        if id(whole) not in replacements:
            replacements[id(whole)] = sharding.parameter(sharding.mine(whole), whole.requires_grad)
            retire(whole)
    for holder in holders:
        holder.module._parameters[holder.name] = replacements[id(holder.whole)]
        record(holder.module, holder.name, sharding)
        state.attach(holder.module)
        if isinstance(holder.module, nn.Embedding):
            ShardedEmbedding.take(holder.module)
    ddp.leave_rows_alone(model)
    for module in model.modules():
        if callable(getattr(module, _RESIZE, None)):
            vars(module)[_RESIZE] = _refuse_resizing


def unshard_parameters(model: nn.Module) -> list[nn.Module]:
    """Gather every sharded parameter of ``model``, on all ranks together; the modules that had one."""
    whole: dict[int, nn.Parameter] = {}
    modules = [module for module in model.modules() if shardings_of(module)]
    for module in modules:
        for name, sharding in shardings_of(module).items():
            parameter = module._parameters.get(name)
            if parameter is None:
                raise ValueError(
                    "a DeepSpeed engine trains the sharded head: call engine.destroy() before LMHead.unwrap(model)"
                )
            if id(parameter) not in whole:
                gathered = sharding.whole(parameter, f"LMHead.unwrap's whole {name}")
                whole[id(parameter)] = nn.Parameter(gathered, parameter.requires_grad)
                retire(parameter)
            module._parameters[name] = whole[id(parameter)]
        undo_unit(module)
        state.detach(module)
        forget(module)
        if isinstance(module, ShardedEmbedding):
            ShardedEmbedding.release(module)
    ddp.forget_names(model)
    for module in model.modules():
        if vars(module).get(_RESIZE) is _refuse_resizing:
            del vars(module)[_RESIZE]
    return modules


def _refuse_resizing(*_args: Any, **_keywords: Any) -> NoReturn:
    """In the place of a method of Transformers' models, which changes the sizes of parameters in place."""
    raise RuntimeError(f"the embeddings to be resized have their rows sharded over ranks: {_FIRST_UNWRAP}")


@run_as_written
def _refuse_trainable_tokens(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Runs when a module is put into another, such as an adapter."""
    if module is not None and shardings_of(module) and _reads_rows_by_number(parent):
        raise ValueError(_TRAINABLE_TOKENS)


def _reads_rows_by_number(module: nn.Module) -> bool:
    adapters = sys.modules.get("peft.tuners.trainable_tokens.layer")
    return adapters is not None and isinstance(module, adapters.TrainableTokensLayer)


@run_as_written
def _refuse_replacement(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Runs when a module is put into another: its replacement would be made from this rank's rows alone."""
    before = vars(parent)["_modules"].get(name)
    if before is None or not shardings_of(before):
        return
    if module is not None and (before in module.modules() or _hold_the_same(before, module)):
        return
    raise RuntimeError(
        f"{type(module).__name__} would take the place of {name!r}, whose rows are sharded over ranks: {_FIRST_UNWRAP}"
    )


def _hold_the_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are tied by all of their sharded rows."""
    names = shardings_of(one).keys()
    return names == shardings_of(other).keys() and all(getattr(one, name) is getattr(other, name) for name in names)


nn.modules.module.register_module_module_registration_hook(_refuse_trainable_tokens)
nn.modules.module.register_module_module_registration_hook(_refuse_replacement)


def _holders(model: nn.Module, head: nn.Linear) -> list[Holder]:
    wanted = {id(parameter) for parameter in map(head._parameters.get, ("weight", "bias")) if parameter is not None}
    return [
        Holder(path, module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]


def _check_shardable(model: nn.Module, head: nn.Linear, holders: list[Holder]) -> None:
    """Raise ``ValueError`` for parameters that cannot be sharded."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ValueError(f"model must not be inside {type(module).__name__} yet: call LMHead.shard before")
        if _reads_rows_by_number(module) and any(module.base_layer is holder.module for holder in holders):
            raise ValueError(_TRAINABLE_TOKENS)
    if is_parametrized(head):
        raise ValueError("the head has a parametrized weight: remove the parametrization first")
    for parameter in _parameters(head):
        if hasattr(parameter, "ds_id") or is_flattened(parameter) or is_dtensor(parameter):
            raise ValueError(
                "an engine has sharded or released the head already (ZeRO-3, FSDP, tensor parallelism): call "
                "LMHead.shard before the model goes into the engine"
            )
    for holder in holders:
        if isinstance(holder.module, nn.Embedding):
            check_can_shard(holder.path, holder.module)
        elif holder.module is not head and holder.name != "bias":  # which some models have in two places
            raise ValueError(
                f"{holder} is tied to the head's weight, and {type(holder.module).__name__} is no nn.Embedding: untie "
                "it first"
            )


def _take_alike(head: nn.Linear, sharding: RowSharding, places: int) -> None:
    """Raise ``ValueError`` for heads that differ between ranks; where only values do, take those of the first rank."""
    parameters = _parameters(head)
    facts = {
        "shapes": [tuple(parameter.shape) for parameter in parameters],
        "dtypes": [parameter.dtype for parameter in parameters],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "devices": ["meta" if parameter.is_meta else "with values" for parameter in parameters],
        "numbers of places in the model": places,
    }
    values = [None if parameter.is_meta else checksum(parameter) for parameter in parameters]
    everyones = [(facts, values)]
    for group in sharding.groups:  # then everyone has the facts of all ranks
        parts = exchange(everyones, group, "chunked_ce: LMHead.shard's comparison of heads")
        everyones = [one for part in parts for one in part]
    for name in facts:
        said = [other[name] for other, _ in everyones]
        if any(one != said[0] for one in said):
            raise ValueError(f"ranks of the group have different heads; their {name} are {said}")
    if any(others != values for _, others in everyones):
        for parameter in parameters:
            sharding.take_from_first(parameter.data, "LMHead.shard's values of the first rank")


def _parameters(head: nn.Linear) -> list[Tensor]:
    return [parameter for parameter in (head.weight, head.bias) if parameter is not None]
