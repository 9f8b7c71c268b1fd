"""The token-weighted mean under DeepSpeed: what its engine divides by, read off the engine.

Between `engine.backward(loss)` and the gradient that the optimizer sees, DeepSpeed 0.19 divides by

    accumulation steps    in engine.backward, unless scale_wrt_gas=False; `loss.backward()` divides always
    ranks                 those that the gradients are reduced over (tensor and pipeline parallel ranks are not among
                          them), unless gradient_allreduce_op is "sum"

and by the ranks over the sequence-parallel size, that is by the data-parallel ranks alone, in ZeRO 0 to 2 and in ZeRO-3
without reduce_scatter. ZeRO-3 with reduce_scatter, its default, divides by the sequence-parallel ranks too. Loss
scaling, prescale_gradients and gradient_predivide_factor cancel out (`_check_predivide` names the exceptions).
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from chunked_ce.distributed.tokens import TokenMean

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["token_mean"]

GRADIENTS, WEIGHTS = 2, 3  # ZeRO stages, by what they partition


def token_mean(
    engine: "DeepSpeedEngine",
    targets_of_the_window: Tensor | Iterable[Tensor],
    *,
    ignore_index: int = -100,
    scale_wrt_gas: bool = True,
) -> TokenMean:
    """The mean over the tokens that count in one accumulation window, on all ranks of a DeepSpeed engine.

        for window in windows:                                   # gradient_accumulation_steps micro-batches
            mean = token_mean(engine, [target for _, target in window])
            for tokens, target in window:
                engine.backward(mean(engine(tokens, target)))    # the model returns the sum of its losses
                engine.step()

    The gradient is that of sum_rm S_rm / T (see `TokenMean`), for every ZeRO stage and for data, sequence and tensor
    parallel ranks. One all-reduce: every rank of the engine calls it, once per window.

    Args:
        engine: what `deepspeed.initialize` returned.
        targets_of_the_window: this rank's targets, one tensor per micro-batch, or one tensor of any shape with the
            targets of all of them.
        ignore_index: the target that marks a token as not counted.
        scale_wrt_gas: what `engine.backward` is given.

    Raises:
        TypeError: engine is not a DeepSpeed engine.
        ValueError: the number of micro-batches is not the engine's gradient_accumulation_steps (not checked where the
            caller sets the accumulation boundary), or the engine's gradients are not a multiple of the right ones.
    """
    _check_engine(engine)
    if not isinstance(targets_of_the_window, Tensor) and isinstance(targets_of_the_window, Iterable):
        targets_of_the_window = list(targets_of_the_window)
        _check_window(engine, len(targets_of_the_window))
    group = _reduction_group(engine)
    _check_sequence_ranks(engine, group)
    _check_predivide(engine, group)
    steps = engine.gradient_accumulation_steps() if scale_wrt_gas else 1
    divisor = _ranks_divided_by(engine, group) * steps
    return TokenMean.over(targets_of_the_window, group=group, divisor=divisor, ignore_index=ignore_index)


def _reduction_group(engine: "DeepSpeedEngine") -> dist.ProcessGroup:
    """The ranks whose gradients are added up. Experts have other groups, with the same divisor."""
    if engine.zero_optimization_stage() == WEIGHTS:
        for parameter in engine.module.parameters():
            if getattr(parameter, "ds_zero_placement_family", "replicated") == "replicated":
                return parameter.ds_process_group
    return engine.seq_data_parallel_group


def _ranks_divided_by(engine: "DeepSpeedEngine", group: dist.ProcessGroup) -> float:
    if not engine.gradient_average:
        return 1
    ranks = dist.get_world_size(group)
    if engine.zero_optimization_stage() == WEIGHTS and _scatters(engine):
        return ranks
    return ranks / engine.sequence_parallel_size


def _scatters(engine: "DeepSpeedEngine") -> bool:
    """Whether ZeRO-3 reduce-scatters its gradients, rather than all-reduce a contiguous bucket of them."""
    return engine.zero_reduce_scatter() or not engine.zero_contiguous_gradients()


def _check_engine(engine: object) -> None:
    # Who has an engine has imported its module: no need to import it here.
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is None or not isinstance(engine, module.DeepSpeedEngine):
        raise TypeError(f"engine must be what deepspeed.initialize returned, got {type(engine).__name__}")


def _check_window(engine: "DeepSpeedEngine", micro_batches: int) -> None:
    steps = engine.gradient_accumulation_steps()
    set_by_caller = (
        not engine.managed_gradient_accumulation() or engine._is_gradient_accumulation_boundary is not None
    )
    if micro_batches != steps and not set_by_caller:
        raise ValueError(
            f"targets_of_the_window holds {micro_batches} micro-batches, but the engine steps after "
            f"gradient_accumulation_steps={steps}; give one tensor for each, or one tensor with all targets"
        )


def _check_sequence_ranks(engine: "DeepSpeedEngine", group: dist.ProcessGroup) -> None:
    if engine.sequence_parallel_size == 1:
        return
    reduced = dist.get_process_group_ranks(group)
    missing = set(dist.get_process_group_ranks(engine.seq_parallel_group)) - set(reduced)
    if missing:
        raise ValueError(
            f"engine reduces gradients over ranks {reduced} only, so the sequence-parallel ranks {sorted(missing)} "
            "would train on their own tokens alone; DeepSpeed does this to a mesh_param (or data_parallel_size) below "
            "ZeRO-3: give deepspeed.initialize mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp instead"
        )
    if engine.zero_optimization_stage() == WEIGHTS and not _scatters(engine):
        # Gradients that do not fit the bucket are reduce-scattered after all.
        bucket = engine.zero_reduce_bucket_size()
        largest = max(parameter.ds_numel for parameter in engine.module.parameters())
        if largest > bucket:
            raise ValueError(
                f"engine has a parameter of {largest} elements and zero_optimization.reduce_bucket_size={bucket}; with "
                "sequence parallelism and reduce_scatter=False, DeepSpeed averages that one over the sequence-parallel "
                "ranks and adds the others up: raise reduce_bucket_size, or set reduce_scatter=True"
            )


def _check_predivide(engine: "DeepSpeedEngine", group: dist.ProcessGroup) -> None:
    """DeepSpeed takes a predivide factor equal to the ranks for the whole division, also where it is not."""
    factor, ranks = engine.gradient_predivide_factor(), dist.get_world_size(group)
    if factor != ranks or ranks == 1 or engine.zero_reduce_scatter() or not engine.postscale_gradients():
        return
    stage = engine.zero_optimization_stage()
    if stage == WEIGHTS or (stage > 0 and engine.sequence_parallel_size > 1):
        raise ValueError(
            f"engine has gradient_predivide_factor={factor} on {ranks} ranks, which DeepSpeed scales wrongly in ZeRO "
            f"stage {stage} without reduce_scatter: leave gradient_predivide_factor at 1.0"
        )
