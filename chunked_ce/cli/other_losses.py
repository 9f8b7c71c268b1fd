"""Losses besides cross-entropy, as they are measured: this library's, and their formulas on full logits.

Each takes hidden states (N, D), head (V, D) and targets (N,) like those of `chunked_ce.cli.implementations`. Everything
else that it needs follows from these: advantages and ids from the targets, a teacher as wide as the student from the
hidden states and the head themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, Teacher, linear_divergence, linear_logprobs, linear_loss, linear_statistics
from chunked_ce.cli.synthetic_inputs import IGNORED
from chunked_ce.objectives import PolicyGradient, TopKDivergence

__all__ = ["OTHER_LOSSES", "OtherLoss"]

_IDS = 64  # of a top-k teacher
_OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "is_top1")
_OLD = -10.0  # old log-probabilities: near those of a head as it is initialised, some ratios are clipped


class OtherLoss(NamedTuple):
    """A loss by both implementations, and how many products of N V D multiplications it cannot do without."""

    products: int
    ours: Callable[[Tensor, Tensor, Tensor, ChunkOptions], Tensor]
    full: Callable[[Tensor, Tensor, Tensor], Tensor]


def _logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, V) on full logits, and the targets' (N,), 0 where ignored."""
    logprobs = F.linear(hidden, weight).float().log_softmax(-1)
    chosen = logprobs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logprobs, chosen * (target != IGNORED)


def _advantage(target: Tensor) -> Tensor:
    return (target % 7 - 3).float()


def _policy(hidden: Tensor, weight: Tensor, target: Tensor, options: ChunkOptions) -> Tensor:
    advantage = _advantage(target)
    old = torch.full_like(advantage, _OLD)
    objective = PolicyGradient()
    return linear_loss(objective, hidden, weight, target, options=options, advantage=advantage, old_logprob=old)


def _full_policy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    _, chosen = _logprobs(hidden, weight, target)
    ratio, advantage = (chosen - _OLD).exp(), _advantage(target)
    losses = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (losses * (target != IGNORED)).sum() / (target != IGNORED).sum().clamp(min=1)


def _only_logprobs(hidden: Tensor, weight: Tensor, target: Tensor, options: ChunkOptions) -> Tensor:
    return linear_logprobs(hidden, weight, target, options=options)


def _full_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _logprobs(hidden, weight, target)[1]


def _statistics(hidden: Tensor, weight: Tensor, target: Tensor, options: ChunkOptions) -> Tensor:
    found = linear_statistics(hidden, weight, target, outputs=_OUTPUTS, options=options)
    return torch.stack([getattr(found, name) for name in _OUTPUTS])


def _full_statistics(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    z = F.linear(hidden, weight).float()
    logprobs, lse = z.log_softmax(-1), z.logsumexp(-1)
    chosen = logprobs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy, squares = -(logprobs.exp() * logprobs).sum(-1), (2 * logprobs).logsumexp(-1)
    top = (z.argmax(-1) == target).float()
    return torch.stack([chosen, entropy, lse, squares, z.mean(-1), top]) * (target != IGNORED)


def _teacher(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Another distribution for each token: that of the token after it."""
    return hidden.detach().roll(1, 0), weight.detach()


def _divergence(hidden: Tensor, weight: Tensor, target: Tensor, options: ChunkOptions) -> Tensor:
    teacher = Teacher(*_teacher(hidden, weight))
    return linear_divergence(hidden, weight, teacher, target=target, options=options)


def _full_divergence(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    of_student, of_teacher = (F.linear(*head).float() for head in ((hidden, weight), _teacher(hidden, weight)))
    losses = F.kl_div(of_student.log_softmax(-1), of_teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (losses * (target != IGNORED)).sum() / (target != IGNORED).sum().clamp(min=1)


def _top(target: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """K different ids of each token, and their log-probabilities, 0.9 together."""
    step = max(1, vocab_size // _IDS)
    ids = target.clamp(min=0).unsqueeze(-1) + step * torch.arange(min(_IDS, vocab_size), device=target.device)
    decay = -0.1 * torch.arange(ids.shape[1], device=target.device)
    return ids % vocab_size, (decay.log_softmax(0) + torch.log(torch.tensor(0.9))).expand(ids.shape)


def _top_k(hidden: Tensor, weight: Tensor, target: Tensor, options: ChunkOptions) -> Tensor:
    ids, logprobs = _top(target, len(weight))
    return linear_loss(
        TopKDivergence(), hidden, weight, target, options=options, teacher_ids=ids, teacher_logprobs=logprobs
    )


def _full_top_k(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    ids, p = _top(target, len(weight))
    q = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, ids)
    rest_p, rest_q = (torch.log1p(-part.exp().sum(-1)) for part in (p, q))
    losses = (p.exp() * (p - q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)
    return (losses * (target != IGNORED)).sum() / (target != IGNORED).sum().clamp(min=1)


OTHER_LOSSES = {
    "policy": OtherLoss(3, _policy, _full_policy),
    "logprobs": OtherLoss(4, _only_logprobs, _full_logprobs),
    "statistics": OtherLoss(4, _statistics, _full_statistics),
    "divergence": OtherLoss(4, _divergence, _full_divergence),
    "top-k": OtherLoss(3, _top_k, _full_top_k),
}
