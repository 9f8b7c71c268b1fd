"""What the operators of this package share: arguments and results that travel flat, and upstream gradients.

Operators take and return tensors and plain numbers only. An optional result that nobody asked for is a tensor of no
elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce.engine import rows
from chunked_ce.engine.rows import Slopes, Wanted
from chunked_ce.engine.sharded import Shard
from chunked_ce.objective import RowStatistics


def flat_shard(shard: Shard | None) -> Shard:
    """A shard or its absence, in the arguments ``group_name, start, total, input_grad, reduce_dtype``."""
    return Shard(None, 0, 0, "", None) if shard is None else shard


def shard_of(*flat) -> Shard | None:
    """The inverse of `flat_shard`."""
    return None if flat[0] is None else Shard(*flat)


def only_wanted(found: Sequence[Tensor], wanted: Wanted) -> list[Tensor | None]:
    return [part if want else None for part, want in zip(found, wanted, strict=True)]


def refuse_shard(shard: Shard | None) -> None:
    if shard is not None:
        raise NotImplementedError("vocab: no derivatives of derivatives (create_graph=True) with a sharded vocabulary")


def filled(parts: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off on the devices that have it: the meta device has none."""
    has_it = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_it else contextlib.nullcontext()


def fake_statistics(num_tokens: int, dtype: torch.dtype, device: torch.device, wanted: list[bool]):
    found = rows.empty_statistics(num_tokens, dtype, device, Wanted(*wanted))
    return filled(found, found.log_sum)


def fake_gradients(
    tensors: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype | None],  # None: the tensor's own
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    parts = zip(tensors, dtypes, needed, strict=True)
    grads = [t.new_empty(t.shape, dtype=dtype) if need else None for t, dtype, need in parts]
    return filled(grads, tensors[0])


def upstream_of_wanted(upstream: Sequence[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    """Upstream gradients of log_sum, target, weighted and mean; None for those that nobody asked for."""
    present = (True, True, *wanted[:2])
    return [grad if here else None for grad, here in zip(upstream, present, strict=False)]


def slopes_or_zero(slopes: Sequence[Tensor | None], log_sum: Tensor) -> Slopes:
    """Slopes in log_sum, target, weighted and mean, from upstream gradients that may be undefined."""
    log_sum_slope, target_slope, weighted, mean = slopes
    return Slopes(
        torch.zeros_like(log_sum) if log_sum_slope is None else log_sum_slope,
        torch.zeros_like(log_sum) if target_slope is None else target_slope,
        weighted,
        mean,
    )


def differentiable(found: RowStatistics) -> list[Tensor | None]:
    return [found.log_sum, found.target, found.weighted, found.mean]


def plain_gradients(
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of outputs of a plain graph, themselves differentiable."""
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o is not None and g is not None]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, materialize_grads=True
        )
    )
    return [next(found) if need else None for need in needed]
