"""The token-weighted mean over ranks and micro-batches.

An engine that averages gradients weights all ranks and micro-batches equally, however many counted tokens
they hold. With S_rm the sum of the losses on rank r in micro-batch m, and T the counted tokens of all of them,
the loss should be

    loss = sum_rm S_rm / T

From the losses L_rm that ranks call backward on, the engine computes the gradient of sum_rm L_rm / divisor. So

    L_rm = S_rm * divisor / T        gives        sum_rm L_rm / divisor = sum_rm S_rm / T

whatever the engine divides by, as long as `divisor` is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce.arguments import (
    COUNTS,
    FLOATING,
    INDICES,
    WEIGHTS,
    check_tensor,
    described,
    integer,
    is_integer,
    number,
)
from chunked_ce.known_tokens import remember
from chunked_ce.reductions import MEAN, SCALED, marked, reduction_of
from chunked_ce.tracing import check_values

__all__ = ["TokenMean", "count_tokens", "sequence_weights"]


def count_tokens(
    targets: Tensor | Iterable[Tensor],
    *,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The number of targets on all ranks that are not `ignore_index`: the T of a token-weighted mean.

    One all-reduce over `group`, no host synchronisation. Every rank of the group calls it, even one without
    tokens. On a GPU, a loss that is then given one of the same tensors as its target need not wait for the
    device to learn which of its tokens are ignored; so after `TokenMean.over`.

    Args:
        targets: int32 or int64 of any shape, or several such tensors (the micro-batches of a window). Tensors
            may be empty, and so may the list.
        ignore_index: the target that marks a token as not counted.
        group: the ranks that hold different tokens (data and sequence parallel). Leave out ranks that hold
            the same ones (tensor parallel), or they are counted twice. None: all ranks if torch.distributed
            is initialised, else this process alone.

    Returns:
        0-d int64, on the targets' device. A group that cannot reduce there (NCCL, given targets on the CPU)
        returns it on its own current device.

    Raises:
        TypeError: targets that are not int32 or int64 tensors, or a group that this rank is not in.

    >>> count_tokens([torch.tensor([[5, -100, 7]]), torch.tensor([-100])])
    tensor(2)
    """
    targets = _check_targets(targets)
    _check_group(group)
    ignore_index = integer("ignore_index", ignore_index)
    return _sum_over_ranks(_add_up((_counted(target, ignore_index).sum() for target in targets), torch.int64), group)


def sequence_weights(target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Token weights that make a mean over tokens one over sequences: 1 / (counted tokens of the token's sequence).

    Each token then weighs as much in its sequence's mean, and each sequence as much in the mean over sequences. Give
    them to a loss as ``token_weight``, and to `TokenMean.over` as ``weights``: their sum is the number of sequences
    that have a counted token.

    Args:
        target: int32 or int64 (..., T), a whole sequence in each row.
        ignore_index: the target that marks a token as not counted.

    Returns:
        float64 (..., T), 0 where ignored.

    Raises:
        TypeError: target is not an int32 or int64 tensor.

    >>> sequence_weights(torch.tensor([[3, 1, -100, 2, 7], [-100, 5, -100, 4, -100]]))
    tensor([[0.2500, 0.2500, 0.0000, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.0000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    check_tensor("target", target, INDICES)
    counted = target != integer("ignore_index", ignore_index)
    return counted / counted.sum(-1, keepdim=True).clamp(min=1).double()


class TokenMean:
    """The mean over all counted tokens, weighted or not, on whatever rank and in whatever micro-batch they are.

    Made once per window, before its first backward: every micro-batch needs the whole window's count.

        mean = TokenMean.over(targets_of_the_window, group=data_group)
        for hidden, target in window:
            loss_sum = linear_cross_entropy(hidden, head, target, reduction="sum")    # S_rm
            mean.for_backward(loss_sum).backward()                                    # S_rm * divisor / T
        mean.report(loss_sums)                                                        # sum_rm S_rm / T

    Both take sums: the loss of ``reduction="sum"``. `for_backward` scales a sum for the engine, so that its result is
    no value to log. ``mean(loss_sum)`` is `for_backward` in short.

    Args:
        num_tokens: T, the same on every rank: a number >= 0 or a 0-d tensor, for a denominator of your own.
            `TokenMean.over` counts targets, or adds up their weights.
        group: the ranks whose sums `report` adds up, as in `count_tokens`.
        divisor: the whole divisor between the loss and a parameter's gradient, > 0. None: the group's
            size (1 without a group), which is what DDP and FSDP divide by. Accumulation steps belong in it
            where the engine divides by them: a plain loop of backwards does not, DeepSpeed does
            (`chunked_ce.integrations.deepspeed.token_mean` finds its divisor).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> mean = TokenMean.over([torch.tensor([3, 1, -100]), torch.tensor([2])])    # 2 and 1 counted tokens
    >>> mean.for_backward(torch.tensor(6.0)), mean.for_backward(torch.tensor(3.0))
    (tensor(2.), tensor(1.))
    >>> mean.report([torch.tensor(6.0), torch.tensor(3.0)])
    tensor(3.)
    """

    def __init__(
        self,
        num_tokens: Tensor | float,
        *,
        group: dist.ProcessGroup | None = None,
        divisor: float | None = None,
    ):
        _check_group(group)
        self.num_tokens = _check_num_tokens(num_tokens)  # (), T
        self.group = group
        self.divisor = _check_divisor(divisor, group)

    @classmethod
    def over(
        cls,
        targets: Tensor | Iterable[Tensor],
        *,
        group: dist.ProcessGroup | None = None,
        divisor: float | None = None,
        ignore_index: int = -100,
        weights: Tensor | Iterable[Tensor] | None = None,
    ) -> TokenMean:
        """The mean over the targets that count in this window on all ranks of `group`: one all-reduce.

        With `weights`, one tensor for each of `targets` and in its shape, T is the sum of the weights of those targets:
        the `token_weight` that the losses are given. Those of `sequence_weights` make it the mean over sequences.

        >>> targets = [torch.tensor([[3, 1, 4, 2], [2, -100, -100, -100]]), torch.tensor([[5, 6, -100, -100]])]
        >>> TokenMean.over(targets, weights=map(sequence_weights, targets)).num_tokens
        tensor(3., dtype=torch.float64)
        """
        _check_group(group)
        divisor = _check_divisor(divisor, group)
        if weights is None:
            num_tokens = count_tokens(targets, ignore_index=ignore_index, group=group)
        else:
            targets, weights = _check_weights(targets, weights)
            ignore_index = integer("ignore_index", ignore_index)
            counted = (_counted(target, ignore_index) for target in targets)
            pairs = zip(weights, counted, strict=True)
            sums = (weight.double().where(counts, 0).sum() for weight, counts in pairs)
            num_tokens = _sum_over_ranks(_add_up(sums, torch.float64), group)
            check_values(num_tokens, _is_count, "weights must have a finite sum >= 0 over the targets that count")
        return cls(num_tokens, group=group, divisor=divisor)

    def for_backward(self, loss_sum: Tensor) -> Tensor:
        """The loss to call backward on for one micro-batch: loss_sum * divisor / T, attached to loss_sum's graph.

        `loss_sum` is 0-d and floating. The result is float32 (float64 for float64). Where no token counts on
        any rank it is 0, with zero gradients. For a value to log, give the sums to `report`.

        Raises:
            TypeError: loss_sum is not a floating-point tensor.
            ValueError: it is not 0-d; or it is known to be no sum, by its node in the autograd graph or by a mark that
                the losses of this package leave: a mean, or a result of this method. A sum divided by hand, and most
                losses of compiled code, are not recognised.

        >>> loss = torch.nn.functional.cross_entropy(torch.zeros(2, 8, requires_grad=True), torch.tensor([3, 1]))
        >>> TokenMean(2).for_backward(loss)
        Traceback (most recent call last):
            ...
        ValueError: loss_sum must be the sum of the losses of tokens, was their mean, which TokenMean would divide ...
        """
        _check_floating("loss_sum", loss_sum, "a floating-point tensor")
        if loss_sum.dim() != 0:
            raise ValueError(f'loss_sum must be 0-d (reduction="sum"), had shape {tuple(loss_sum.shape)}')
        _check_is_sum("loss_sum", loss_sum)
        return marked(self._over_tokens(loss_sum.to(_loss_dtype(loss_sum)), self.divisor), SCALED)

    def __call__(self, loss_sum: Tensor) -> Tensor:
        """`for_backward`."""
        return self.for_backward(loss_sum)

    def report(self, loss_sums: Tensor | Iterable[Tensor]) -> Tensor:
        """The true global mean, sum_rm S_rm / T: 0-d, detached, equal on every rank; 0 where no token counts.

        One all-reduce: every rank of the group calls it. `loss_sums` holds this rank's sums, one tensor per
        micro-batch (or all in one tensor), none at all if it had no micro-batch. Float32, or float64 for
        float64 sums; an empty list counts as one of the default dtype.

        Raises ``ValueError`` for what `for_backward` refuses, and for its results: they are scaled for the engine.
        """
        sums = [loss_sum.detach() for loss_sum in _check_loss_sums(loss_sums)]
        dtype = _loss_dtype(*sums)
        total = _add_up((loss_sum.sum(dtype=dtype) for loss_sum in sums), dtype)
        return self._over_tokens(_sum_over_ranks(total, self.group), 1.0)

    def _over_tokens(self, loss_sum: Tensor, factor: float) -> Tensor:
        """loss_sum * factor / T, and 0 where T is 0."""
        num_tokens = self.num_tokens.to(loss_sum.device, loss_sum.dtype, non_blocking=True)
        counts = num_tokens > 0
        scale = factor / torch.where(counts, num_tokens, 1.0)
        return torch.where(counts, loss_sum * scale, 0.0)


def _counted(target: Tensor, ignore_index: int) -> Tensor:
    """Which tokens count, as a loss of the same ``target`` will ask as well."""
    counted = target != ignore_index
    remember(target, ignore_index, counted)
    return counted


def _add_up(terms: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of 0-d tensors, on the device of the first one."""
    total = None
    for term in terms:
        total = term.to(dtype) if total is None else total + term.to(total.device, dtype, non_blocking=True)
    return torch.zeros((), dtype=dtype) if total is None else total


def _sum_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _group_size(group) == 1:
        return local
    # As in "cpu:gloo,cuda:nccl": the kinds of device that the group reduces on; "cuda" means the current one.
    devices = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    total = local.clone() if local.device.type in devices else local.to(devices[0], non_blocking=True)
    dist.all_reduce(total, group=group)
    return total


def _group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _loss_dtype(*loss_sums: Tensor) -> torch.dtype:
    dtypes = [loss_sum.dtype for loss_sum in loss_sums] or [torch.get_default_dtype()]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_targets(targets: Tensor | Iterable[Tensor]) -> list[Tensor]:
    targets = _check_tensors("targets", targets)
    for target in targets:
        if target.dtype not in INDICES.dtypes:
            raise TypeError(f"targets must be int32 or int64, was {_describe(target)}")
        check_tensor("targets", target, INDICES)
    return targets


def _check_weights(
    targets: Tensor | Iterable[Tensor], weights: Tensor | Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    targets, weights = _check_targets(targets), _check_tensors("weights", weights)
    if len(weights) != len(targets):
        raise ValueError(f"weights must hold a tensor for each of the {len(targets)} of targets, held {len(weights)}")
    for weight, target in zip(weights, targets, strict=True):
        check_tensor("weights", weight, WEIGHTS)
        if weight.shape != target.shape:
            shapes = f"{tuple(target.shape)}, had {tuple(weight.shape)}"
            raise ValueError(f"weights must have the shape of targets, {shapes}")
        if weight.device != target.device:
            raise ValueError(f"weights must be on the device of targets, {target.device}, was on {weight.device}")
        if weight.requires_grad:
            raise ValueError("weights requires grad, but the mean is not differentiated in it: detach it")
    return targets, weights


def _check_loss_sums(loss_sums: Tensor | Iterable[Tensor]) -> list[Tensor]:
    loss_sums = _check_tensors("loss_sums", loss_sums)
    for loss_sum in loss_sums:
        _check_floating("loss_sums", loss_sum, "floating-point tensors")
        _check_is_sum("loss_sums", loss_sum)
    return loss_sums


def _check_is_sum(name: str, loss: Tensor) -> None:
    """Raise if ``loss`` is known to be a mean, or to be scaled for a backward."""
    reduction = reduction_of(loss)
    if reduction == MEAN:
        raise ValueError(
            f"{name} must be the sum of the losses of tokens, was their mean, which TokenMean would divide again: pass "
            'reduction="sum" to the loss. If this mean is a sum of one, as that of a single sequence where num_tokens '
            "counts sequences, give its .sum()"
        )
    if reduction == SCALED:
        raise ValueError(
            f"{name} must be the sum of the losses of tokens, was the result of for_backward, which is scaled for the "
            "engine: give report, and for_backward, the sum itself"
        )


def _check_floating(name: str, value: object, kind: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be {kind}, was {_describe(value)}")
    check_tensor(name, value, FLOATING)


def _check_tensors(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        tensors = list(tensors)
    except TypeError:
        raise TypeError(f"{name} must be a tensor or an iterable of tensors, was {_describe(tensors)}") from None
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must hold tensors, held {_describe(tensor)}")
    return tensors


def _check_num_tokens(num_tokens: Tensor | float) -> Tensor:
    if isinstance(num_tokens, Tensor):
        check_tensor("num_tokens", num_tokens, COUNTS)
        if num_tokens.dim() != 0:
            raise ValueError(f"num_tokens must be 0-d, had shape {tuple(num_tokens.shape)}")
        if num_tokens.requires_grad:
            raise ValueError("num_tokens requires grad, but the mean is not differentiated in it: detach it")
        check_values(num_tokens, _is_count, "num_tokens must be finite and >= 0")
        return num_tokens
    if not 0 <= number("num_tokens", num_tokens, "a number or a 0-d tensor") < math.inf:
        raise ValueError(f"num_tokens must be finite and >= 0, was {described(num_tokens)}")
    whole = is_integer(num_tokens) and num_tokens < 2**63
    return torch.tensor(int(num_tokens) if whole else float(num_tokens), dtype=torch.int64 if whole else torch.float64)


def _is_count(num_tokens: Tensor) -> Tensor:
    return (num_tokens >= 0) & (num_tokens < math.inf)


def _check_divisor(divisor: float | None, group: dist.ProcessGroup | None) -> float:
    if divisor is None:
        return float(_group_size(group))
    if not 0 < number("divisor", divisor, "a number or None") < math.inf:
        raise ValueError(f"divisor must be finite and > 0, was {described(divisor)}")
    return float(divisor)


def _check_group(group: dist.ProcessGroup | None) -> None:
    # new_group gives a rank that is not in the group a plain int instead of a ProcessGroup.
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be None or a ProcessGroup that this rank is in, was {_describe(group)}")


def _describe(value: object) -> str:
    return described(value) if isinstance(value, Tensor) else f"{described(value)} ({type(value).__name__})"
