"""DeepSpeed: the token-weighted mean with the divisor read off its engine, and an engine with a sharded head."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from chunked_ce.integrations.deepspeed_divisor import WEIGHTS, ranks_divided_by, reduction_group, scatters
from chunked_ce.integrations.deepspeed_initialize import initialize, install, uninstall
from chunked_ce.parallel.tokens import TokenMean

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["initialize", "install", "token_mean", "uninstall"]


def token_mean(
    engine: DeepSpeedEngine,
    targets_of_the_window: Tensor | Iterable[Tensor],
    *,
    ignore_index: int = -100,
    scale_wrt_gas: bool = True,
    weights: Tensor | Iterable[Tensor] | None = None,
) -> TokenMean:
    """The mean over the tokens that count in one accumulation window, on all ranks of a DeepSpeed engine.

        for window in windows:                                   # gradient_accumulation_steps micro-batches
            mean = token_mean(engine, [target for _, target in window])
            for tokens, target in window:
                loss_sum = engine(tokens, target)                # the model returns the sum of its losses
                engine.backward(mean.for_backward(loss_sum))
                engine.step()

    The gradient is that of sum_rm S_rm / T (see `TokenMean`) under every ZeRO stage, with data, sequence and
    tensor parallel ranks. One all-reduce: every rank of the engine calls it, once per window.

    Args:
        engine: what `deepspeed.initialize` returned.
        targets_of_the_window: this rank's targets, one tensor per micro-batch, or one tensor of any shape
            with the targets of all of them.
        ignore_index: the target that marks a token as not counted.
        scale_wrt_gas: the value that `engine.backward` is given.
        weights: as for `TokenMean.over`.

    Raises:
        TypeError: engine is not a DeepSpeed engine.
        ValueError: the number of micro-batches is not the engine's gradient_accumulation_steps (not checked
            where the caller sets the accumulation boundary), or the engine is configured so that no divisor
            makes its gradients right.
    """
    _check_engine(engine)
    if not isinstance(targets_of_the_window, Tensor) and isinstance(targets_of_the_window, Iterable):
        targets_of_the_window = list(targets_of_the_window)
        _check_window(engine, len(targets_of_the_window))
    group = reduction_group(engine)
    _check_sequence_ranks(engine, group)
    _check_predivide(engine, group)
    steps = engine.gradient_accumulation_steps() if scale_wrt_gas else 1
    divisor = ranks_divided_by(engine, group) * steps
    return TokenMean.over(
        targets_of_the_window, group=group, divisor=divisor, ignore_index=ignore_index, weights=weights
    )


def _check_engine(engine: object) -> None:
    # Whoever has an engine has imported its module: no need to import it here.
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is None or not isinstance(engine, module.DeepSpeedEngine):
        raise TypeError(f"engine must be what deepspeed.initialize returned, was a {type(engine).__name__}")


def _check_window(engine: Any, micro_batches: int) -> None:
    steps = engine.gradient_accumulation_steps()
    set_by_caller = engine._is_gradient_accumulation_boundary is not None
    if micro_batches != steps and engine.managed_gradient_accumulation() and not set_by_caller:
        raise ValueError(
            "targets_of_the_window must hold a tensor for each of the engine's "
            f"gradient_accumulation_steps={steps} micro-batches, held {micro_batches}; one tensor with the "
            "targets of all of them will do too"
        )


def _check_sequence_ranks(engine: Any, group: dist.ProcessGroup) -> None:
    """Sequence-parallel ranks hold different tokens: their gradients must be reduced too, and all alike."""
    if engine.sequence_parallel_size == 1:
        return
    reduced = dist.get_process_group_ranks(group)
    missing = set(dist.get_process_group_ranks(engine.seq_parallel_group)) - set(reduced)
    if missing:
        raise ValueError(
            "engine must reduce gradients over its sequence-parallel ranks, but reduces over ranks "
            f"{reduced} without {sorted(missing)}: so does DeepSpeed below ZeRO-3 if given a mesh_param or a "
            "data_parallel_size. Give deepspeed.initialize an mpu instead, such as "
            "deepspeed.runtime.sequence_parallel.parallel_state_sp"
        )
    if engine.zero_optimization_stage() == WEIGHTS and not scatters(engine):
        # A gradient that does not fit the bucket is reduce-scattered after all.
        bucket = engine.zero_reduce_bucket_size()
        largest = max(getattr(parameter, "ds_numel", 0) for parameter in engine.module.parameters())
        if largest > bucket:
            raise ValueError(
                f"engine has zero_optimization.reduce_bucket_size={bucket} and a parameter of {largest} "
                "elements, whose gradient DeepSpeed averages over sequence-parallel ranks, while it adds up "
                "the others: raise reduce_bucket_size, or set reduce_scatter"
            )


def _check_predivide(engine: Any, group: dist.ProcessGroup) -> None:
    """DeepSpeed takes a predivide factor equal to the number of ranks for the whole division, even if it is not."""
    factor, ranks = engine.gradient_predivide_factor(), dist.get_world_size(group)
    predivides = engine.gradient_average and engine.postscale_gradients() and not engine.zero_reduce_scatter()
    if not predivides or factor != ranks or ranks == 1:
        return
    stage = int(engine.zero_optimization_stage())
    if stage == WEIGHTS or (stage > 0 and engine.sequence_parallel_size > 1):
        raise ValueError(
            f"engine has gradient_predivide_factor={factor} on {ranks} ranks, which DeepSpeed scales wrongly "
            f"in ZeRO stage {stage} without reduce_scatter: leave it at 1.0, the default"
        )
