"""DeepSpeed would broadcast, average and partition rows that differ between its ranks: its engine must not get them."""

from __future__ import annotations

from torch import nn

from chunked_ce.sharded.rows import rows_in

__all__ = ["check_out_of_sight"]


def check_out_of_sight(module: nn.Module) -> None:
    """Raise ``ValueError`` if the engine that is being made would take the rows of ``module`` for its own.

    A `DeepSpeedEngine` calls `set_deepspeed_parallelism` of each module that has it, before it touches a parameter.
    """
    if any(True for _ in rows_in(module)):
        raise ValueError(
            "deepspeed.initialize would broadcast, average and partition the rows of a sharded head: import deepspeed "
            "before LMHead.shard(model), which replaces deepspeed.initialize, and look that up afterwards, not in the "
            "statement that calls LMHead.shard; or call chunked_ce.integrations.deepspeed.initialize with the same "
            "arguments"
        )
