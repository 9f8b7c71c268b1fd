"""The losses of GRPO, and the log-probabilities that they need, in chunks and from full logits.

All take hidden states (N, D), the head (V, D) and the sampled tokens (N,).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import linear_logprobs, linear_loss
from chunked_ce.objectives import PolicyGradient

Sums = dict[str, Tensor]  # over the tokens: "clipped", "kl" and "entropy"


def chunked_logprobs(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return linear_logprobs(hidden, head, target)


def chunked_loss(
    policy: PolicyGradient, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, tensors: dict[str, Tensor]
) -> tuple[Tensor, Sums]:
    loss, stats = linear_loss(policy, hidden, head, target, token_weight=weight, return_stats=True, **tensors)
    return loss, {"clipped": stats.clipped, "kl": stats.kl, "entropy": stats.entropy_sum}


def full_logprobs(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, head).float()  # (N, V)
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def full_loss(
    policy: PolicyGradient, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, tensors: dict[str, Tensor]
) -> tuple[Tensor, Sums]:
    advantage, old, reference = (tensors[name] for name in ("advantage", "old_logprob", "ref_logprob"))
    logprobs = F.linear(hidden, head).float().log_softmax(-1)  # (N, V)
    logprob = logprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    ratio = (logprob - old).exp()
    whole, cut = ratio * advantage, ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high) * advantage
    kl = (reference - logprob).exp() - (reference - logprob) - 1
    losses = -torch.minimum(whole, cut) + policy.kl * kl - policy.entropy * entropy
    sums = {"clipped": (cut < whole).sum(), "kl": kl.sum(), "entropy": entropy.sum()}
    return (losses * weight).sum() / weight.sum(), {name: value.detach() for name, value in sums.items()}


LOSSES: dict[str, tuple[Callable, Callable]] = {
    "chunked": (chunked_logprobs, chunked_loss),
    "full": (full_logprobs, full_loss),
}
