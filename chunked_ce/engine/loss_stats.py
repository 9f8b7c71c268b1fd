"""The sums that a loss returns beside its value, computed by an operator.

A compiler that sees how the sums depend on the loss folds the loss, times one, and its detached sum into one tensor
without a gradient. It does not see into an operator, whose results are separate tensors.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.tracing import assume_constant

__all__ = ["LossStats", "loss_stats", "named_stats", "plain_loss_stats"]


class LossStats(NamedTuple):
    """Summary statistics of a loss, as detached 0-d float32 tensors on the device.

    Ranks, chunks and micro-batches combine by SUM, ``lse_max`` by MAX. Each token that counts adds to predictions,
    entropies and log-sum-exps once, whatever its weight. The sums that an objective names itself are further fields,
    after these five: ``clipped`` and ``kl`` of `chunked_ce.objectives.PolicyGradient`.
    """

    loss_sum: Tensor
    """Sum of the losses, token weights in."""
    num_tokens: Tensor
    """This call's share of the mean's denominator: the sum of ``token_weight * weight[target]``."""
    num_correct: Tensor
    """Tokens whose target has the largest logit (the first of equals)."""
    entropy_sum: Tensor
    """Sum of the entropies of the predicted distributions, in nats."""
    lse_max: Tensor
    """The largest log-sum-exp, -inf if no token counts."""

    # In the place of the further fields where there are none: types, and an error that says whose they are.

    @property
    def clipped(self) -> Tensor:
        """Tokens whose ratio is clipped, of `chunked_ce.objectives.PolicyGradient`."""
        raise AttributeError("clipped is a sum of PolicyGradient, and these are the statistics of another objective")

    @property
    def kl(self) -> Tensor:
        """Sum of the divergences from the reference, of `chunked_ce.objectives.PolicyGradient` with ``kl > 0``."""
        raise AttributeError("kl is a sum of PolicyGradient with kl > 0, and these are statistics without it")


def named_stats(names: tuple[str, ...], values: Iterable[Tensor]) -> LossStats:
    """A `LossStats` whose fields after its own five are ``names``."""
    # Not `kind(*values)`: a compiler cannot trace the constructor of a class that it got as a constant.
    return tuple.__new__(_kind(names), values) if names else LossStats(*values)


@assume_constant  # a compiler cannot trace the making of a class
def _kind(names: tuple[str, ...]) -> type[LossStats]:
    return _kinds(names)


@functools.cache
def _kinds(names: tuple[str, ...]) -> type[LossStats]:
    fields = namedtuple("LossStats", (*LossStats._fields, *names))  # type: ignore[misc]  # names of a call
    body: dict[str, Any] = {"__slots__": (), "__module__": __name__, "__doc__": LossStats.__doc__}
    body["__reduce__"] = lambda stats: (named_stats, (names, tuple(stats)))  # no module has this class by its name
    return type("LossStats", (fields, LossStats), body)


def loss_stats(
    loss_sum: Tensor,  # ()
    num_tokens: Tensor,  # ()
    lse: Tensor,  # (N,)
    correct: Tensor,  # (N,) 0 where ignored
    entropy: Tensor,  # (N,) 0 where ignored
    counted: Tensor,  # (N,)
    others: Sequence[Tensor],  # (N,) each, 0 where ignored
) -> list[Tensor]:
    """``loss_sum, num_tokens, num_correct, entropy_sum, lse_max``, and the sums of ``others``: detached, each (), in
    fp32."""
    known = (part.detach() for part in (loss_sum, num_tokens, lse, correct, entropy, counted))
    sums: list[Tensor] = _loss_stats(*known, [part.detach() for part in others])
    return sums


def plain_loss_stats(
    loss_sum: Tensor,
    num_tokens: Tensor,
    lse: Tensor,
    correct: Tensor,
    entropy: Tensor,
    counted: Tensor,
    others: Sequence[Tensor],
) -> list[Tensor]:
    """`loss_stats` for ``torch.func`` transforms."""
    lse_max = torch.cat([lse.new_full((1,), -torch.inf), lse.where(counted, -torch.inf)]).amax()
    sums = (loss_sum, num_tokens, correct.sum(), entropy.sum(), lse_max, *(part.sum() for part in others))
    return [value.detach().to(torch.float32, copy=True) for value in sums]


@torch.library.custom_op("chunked_ce::loss_stats", mutates_args=())
def _loss_stats(
    loss_sum: Tensor,
    num_tokens: Tensor,
    lse: Tensor,
    correct: Tensor,
    entropy: Tensor,
    counted: Tensor,
    others: Sequence[Tensor],
) -> list[Tensor]:
    return plain_loss_stats(loss_sum, num_tokens, lse, correct, entropy, counted, others)


@_loss_stats.register_fake
def _(loss_sum: Tensor, *tensors: Any) -> list[Tensor]:
    return [loss_sum.new_empty((), dtype=torch.float32) for _ in range(5 + len(tensors[-1]))]
