"""Objectives that a user might write, and what they should give: dense logits in float64."""

import dataclasses

import torch
import torch.nn.functional as F

from chunked_ce.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Focal(Objective):
    """arXiv:1708.02002, equation 4."""

    gamma: float = 2.0

    def loss(self, rows, tokens):
        return -((1 - rows.logprob.exp()) ** self.gamma) * rows.logprob

    @staticmethod
    def dense(logits, target, gamma=2.0):
        logprob = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        return -((1 - logprob.exp()) ** gamma) * logprob


@dataclasses.dataclass(frozen=True)
class Policy(Objective):
    """A policy gradient with an entropy bonus: a statistic besides the usual ones, and a tensor for each token."""

    bonus: float = 0.1
    statistics = ("mean",)
    per_token = ("advantage",)

    def loss(self, rows, tokens):
        return -tokens.advantage * rows.logprob - self.bonus * rows.entropy

    @staticmethod
    def dense(logits, target, advantage, bonus=0.1):
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return -advantage * logprobs.gather(1, target[:, None]).squeeze(1) - bonus * entropy


@dataclasses.dataclass(frozen=True)
class Uniform(Objective):
    """The mean of all logits beside the log-sum-exp, and a name among its fields."""

    kind: str = "square"
    statistics = ("weighted",)

    def loss(self, rows, tokens):
        gap = tokens.vocab_size * rows.log_sum - rows.weighted
        return rows.nll + (gap / tokens.vocab_size) ** 2 if self.kind == "square" else rows.nll

    @staticmethod
    def dense(logits, target):
        gap = torch.logsumexp(logits, -1) - logits.mean(-1)
        return F.cross_entropy(logits, target, reduction="none") + gap**2


OBJECTIVES = {"focal": Focal(2.5), "policy": Policy(0.3), "uniform": Uniform()}
FIELDS = {"focal": {"gamma": 2.5}, "policy": {"bonus": 0.3}, "uniform": {}}


def per_token(name, n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return {"advantage": torch.randn(n, generator=generator).to(dtype)} if name == "policy" else {}


def expected(name, case, reduction="mean", softcap=None, token_weight=None):
    """The value and the gradients of the leaves of ``case``, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in case.leaves()]
    logits = F.linear(*leaves) if len(leaves) > 1 else leaves[0]  # logits that exist are the only leaf
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = case.target != -100
    target = case.target.where(counted, 0)
    named = per_token(name, len(target), torch.float64)
    losses = type(OBJECTIVES[name]).dense(logits, target, **named, **FIELDS[name])
    weight = torch.ones(len(target), dtype=torch.float64) if token_weight is None else token_weight.double()
    losses = (losses * weight).where(counted, 0)
    if reduction == "none":
        return losses, None
    value = losses.sum() / ((weight * counted).sum() if reduction == "mean" else 1)
    return value.detach(), torch.autograd.grad(value, leaves)
