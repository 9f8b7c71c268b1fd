"""`deepspeed.initialize` for a model with a sharded head, whose rows stay out of the engine."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from chunked_ce.integrations.deepspeed_divisor import ranks_divided_by, reduction_group
from chunked_ce.integrations.deepspeed_engine import SeparateRows, WithSeparateRows
from chunked_ce.integrations.deepspeed_rows import Rows, rows_of
from chunked_ce.lazy.classes import joined

__all__ = ["follow_deepspeed", "initialize", "install", "uninstall"]

_replaced: Callable[..., tuple[Any, ...]] | None = None  # deepspeed.initialize, while ours is in its place


def initialize(*args: Any, **keywords: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` for a model whose head `LMHead.shard` has sharded; without such a head it is the same.

        import deepspeed

        LMHead.shard(model)
        engine, *_ = deepspeed.initialize(model=model, config=config)  # this function, which LMHead.shard has put there

    Each rank's rows of the head (and of the embedding tied to it) stay out of the engine, which neither broadcasts nor
    averages, partitions nor gathers them. The engine's ``step`` steps them too: by the same optimizer, with the
    settings of the group that they were in, and clipped by the norm of all gradients. State dicts and checkpoints of
    the engine hold them, ``engine.module.parameters()`` does not.

    Args:
        args, keywords: those of `deepspeed.initialize`.

    Raises:
        ValueError: the head is sharded over other ranks than the engine averages over; the optimizer does not hold the
            rows; or the configuration has what does not work with them.
    """
    import deepspeed

    original = _replaced or deepspeed.initialize
    call = inspect.signature(original).bind(*args, **keywords)
    model = call.arguments.get("model")
    rows = rows_of(model) if isinstance(model, nn.Module) else []
    if model is None or not rows:
        return original(*args, **keywords)
    _check_model(model, rows)
    _leave_optimizer(rows, call.arguments)
    for one in rows:
        one.hide()
    try:
        returned = original(*call.args, **call.kwargs)
        _join(returned[0], rows)
    except BaseException:
        for one in rows:
            one.show()
        raise
    return returned


def install() -> None:
    """Put `initialize` in the place of ``deepspeed.initialize``, for all who call that, as Accelerate does.

    `LMHead.shard` does so where DeepSpeed has been imported.
    """
    global _replaced
    import deepspeed

    if _replaced is None:
        _replaced, deepspeed.initialize = deepspeed.initialize, initialize


def uninstall() -> None:
    """Undo `install`."""
    global _replaced
    import deepspeed

    if _replaced is not None:
        deepspeed.initialize, _replaced = _replaced, None


def follow_deepspeed() -> None:
    """`install`, if DeepSpeed has been imported."""
    if hasattr(sys.modules.get("deepspeed"), "initialize"):
        install()


# ---- the optimizer gets the other parameters ----


def _leave_optimizer(rows: list[Rows], arguments: dict[str, Any]) -> None:
    """Take the rows out of the optimizer or the parameters that `deepspeed.initialize` is given."""
    optimizer, given = arguments.get("optimizer"), arguments.get("model_parameters")
    if isinstance(optimizer, Optimizer):
        _take_out(rows, optimizer.param_groups, "optimizer")
        for one in rows:
            one.state = optimizer.state.pop(one.parameter, {})
        return
    if given is None:
        hidden = {id(one.parameter) for one in rows}
        if any(one.requires_grad and id(one) not in hidden for one in arguments["model"].parameters()):
            return  # the engine asks the model for its parameters, which does not give the rows
        given = arguments["model"].parameters()
    given = list(given.values()) if isinstance(given, dict) else list(given)
    if given and isinstance(given[0], dict):
        groups = [group | {"params": _as_list(group["params"])} for group in given]
        _take_out(rows, groups, "model_parameters")
        arguments["model_parameters"] = groups
    else:
        group = {"params": given}
        _take_out(rows, [group], "model_parameters")
        arguments["model_parameters"] = group["params"]


def _as_list(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _take_out(rows: list[Rows], groups: list[dict[str, Any]], argument: str) -> None:
    """Take the rows out of the groups of an optimizer; each remembers in which one it was."""
    for one in rows:
        holding = [group for group in groups if any(parameter is one.parameter for parameter in group["params"])]
        if one.is_trained and not holding:
            raise ValueError(
                f"{argument} must hold the sharded {one.name}, which requires a gradient: make the optimizer after "
                "LMHead.shard(model), which puts a new parameter into the model, or freeze the head"
            )
        for group in holding:
            group["params"] = [parameter for parameter in group["params"] if parameter is not one.parameter]
            if not any(parameter.requires_grad for parameter in group["params"]):
                group["params"].append(one.stand_in())  # or DeepSpeed would drop it, and the rows' learning rate
            kept = [other for other in groups if other["params"]]  # DeepSpeed drops those that are empty
            one.group = next(index for index, other in enumerate(kept) if other is group)


# ---- the engine ----


def _join(engine: Any, rows: list[Rows]) -> None:
    """Let a new engine train the rows."""
    _check_engine(engine, rows)
    dtype = engine.get_data_types()[0] if engine.bfloat16_enabled() else None
    masters_at = torch.device("cpu") if engine.zero_use_cpu_optimizer() else engine.device
    partitions_weights = engine.zero_optimization_partition_weights()
    for one in rows:
        one.settle(engine.device, dtype, masters_at)
        # ZeRO-3's checkpoints would hold all ranks' rows once a rank.
        one.in_state_dicts = not partitions_weights
    scale = rows[0].vocab.size / ranks_divided_by(engine, reduction_group(engine))
    clips_itself = not (engine.zero_optimization() or engine.bfloat16_enabled())
    engine.separate_rows = separate = SeparateRows(rows, scale, clips_itself)
    if engine.basic_optimizer is not None:
        hook = functools.partial(_before_optimizer, separate, engine)
        engine.basic_optimizer.register_step_pre_hook(hook)
    engine.__class__ = joined(WithSeparateRows, type(engine))


def _before_optimizer(separate: SeparateRows, engine: Any, optimizer: Optimizer, args: Any, keywords: Any) -> None:
    separate.before_optimizer(engine, optimizer)


def _check_model(model: nn.Module, rows: list[Rows]) -> None:
    from deepspeed.pipe import PipelineModule

    if any(one.sharding.has_dtensors for one in rows):
        raise ValueError(
            "the head must be sharded over a process group for DeepSpeed, was over a device mesh: give LMHead.shard "
            "mesh.get_group()"
        )
    if isinstance(model, PipelineModule):
        raise ValueError(
            "model must not be a PipelineModule with a head that LMHead.shard has sharded: give the last stage the "
            "rows of a VocabShard over the pipeline's ranks instead"
        )


def _check_engine(engine: Any, rows: list[Rows]) -> None:
    ranks = dist.get_process_group_ranks(reduction_group(engine))
    sharded = dist.get_process_group_ranks(rows[0].vocab.group)
    if set(ranks) != set(sharded):
        raise ValueError(
            f"the head must be sharded over the ranks that the engine averages over, {ranks}, but is over {sharded}: "
            "give LMHead.shard their process group"
        )
    optimizer = engine.basic_optimizer
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer with a sharded head, was {type(optimizer).__name__}"
        )
    unsupported = {
        "legacy_fusion": engine.optimizer_legacy_fusion(),
        "fp16 (bf16 and fp32 do)": engine.fp16_enabled(),
        "torch_autocast in float16": engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
        "the Muon optimizer": any(group.get("use_muon") for group in optimizer.param_groups),
        "DeepCompile": engine.is_deepcompile_enabled(),
        "ZenFlow": engine.zenflow_config() is not None,
        "SuperOffload": engine.super_offload(),
        "a partial offload of the optimizer": engine.zero_use_cpu_optimizer() and engine.zero_partial_offload() < 1.0,
    }
    refused = [what for what, is_so in unsupported.items() if is_so]
    if refused:
        raise ValueError(f"config has what does not work with a sharded head: {', '.join(refused)}")
