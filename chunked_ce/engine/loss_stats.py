"""The sums of a `chunked_ce.LossStats`, as an operator.

A compiler that sees how the sums depend on the loss folds the loss, times one, and its detached sum into one tensor
without a gradient. It does not see into an operator, whose results are separate tensors.
"""

import torch
from torch import Tensor

__all__ = ["loss_stats", "plain_loss_stats"]


def loss_stats(
    loss_sum: Tensor,  # ()
    num_tokens: Tensor,  # ()
    lse: Tensor,  # (N,)
    correct: Tensor,  # (N,) 0 where ignored
    entropy: Tensor,  # (N,) 0 where ignored
    counted: Tensor,  # (N,)
) -> list[Tensor]:
    """``loss_sum, num_tokens, num_correct, entropy_sum, lse_max``: detached, each (), in fp32."""
    return _loss_stats(*(part.detach() for part in (loss_sum, num_tokens, lse, correct, entropy, counted)))


def plain_loss_stats(
    loss_sum: Tensor, num_tokens: Tensor, lse: Tensor, correct: Tensor, entropy: Tensor, counted: Tensor
) -> list[Tensor]:
    """`loss_stats` for ``torch.func`` transforms."""
    lse_max = torch.cat([lse.new_full((1,), -torch.inf), lse.where(counted, -torch.inf)]).amax()
    sums = (loss_sum, num_tokens, correct.sum(), entropy.sum(), lse_max)
    return [value.detach().to(torch.float32, copy=True) for value in sums]


@torch.library.custom_op("chunked_ce::loss_stats", mutates_args=())
def _loss_stats(
    loss_sum: Tensor, num_tokens: Tensor, lse: Tensor, correct: Tensor, entropy: Tensor, counted: Tensor
) -> list[Tensor]:
    return plain_loss_stats(loss_sum, num_tokens, lse, correct, entropy, counted)


@_loss_stats.register_fake
def _(loss_sum, *_):
    return [loss_sum.new_empty((), dtype=torch.float32) for _ in range(5)]
