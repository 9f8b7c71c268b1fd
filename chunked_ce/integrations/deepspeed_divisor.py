"""What a DeepSpeed engine divides gradients by, and the ranks that it reduces them over.

Between the loss and the gradient that the optimizer sees, DeepSpeed (0.19.8) divides by

- the accumulation steps, in `engine.backward` unless scale_wrt_gas=False, and in `loss.backward()`;
- the ranks that gradients are reduced over, unless gradient_allreduce_op is "sum". Sequence-parallel ranks
  add up and are not divided by, except under ZeRO-3 with reduce_scatter (its default), which averages over
  them as over any other. Tensor-parallel ranks are not reduced over.

Loss scaling, prescale_gradients and gradient_predivide_factor cancel out (but see `token_mean`).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["WEIGHTS", "ranks_divided_by", "reduction_group", "scatters"]

WEIGHTS = 3  # the ZeRO stage that partitions the weights


def reduction_group(engine: Any) -> dist.ProcessGroup:
    """The ranks whose gradients are reduced. Experts have groups of their own, with the same divisor."""
    if engine.zero_optimization_stage() == WEIGHTS:
        for parameter in engine.module.parameters():
            replicated = getattr(parameter, "ds_zero_placement_family", "replicated") == "replicated"
            if replicated and hasattr(parameter, "ds_process_group"):
                group: dist.ProcessGroup = parameter.ds_process_group
                return group
    group = engine.seq_data_parallel_group
    return group


def ranks_divided_by(engine: Any, group: dist.ProcessGroup) -> float:
    if not engine.gradient_average:
        return 1
    ranks = dist.get_world_size(group)
    if engine.zero_optimization_stage() == WEIGHTS and scatters(engine):
        return ranks
    return float(ranks / engine.sequence_parallel_size)


def scatters(engine: Any) -> bool:
    """Whether ZeRO-3 reduce-scatters its gradients, rather than all-reduce a contiguous bucket of them."""
    return engine.zero_reduce_scatter() or not engine.zero_contiguous_gradients()
