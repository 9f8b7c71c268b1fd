"""Policy gradients on full logits, as their formulas say, and the tensors per token that the tests give them."""

import math

import torch
import torch.nn.functional as F

from chunked_ce.objectives import PolicyGradient

POLICIES = {
    "clip": PolicyGradient(),
    "clip, all terms": PolicyGradient(clip_low=0.1, clip_high=0.3, kl=0.05, entropy=0.02),
    "cispo": PolicyGradient("cispo", clip_high=0.25, entropy=0.02),
    "cispo, kl": PolicyGradient("cispo", clip_high=0.1, kl=0.5),
    "reinforce": PolicyGradient("reinforce"),
    "reinforce, all terms": PolicyGradient("reinforce", kl=0.1, entropy=0.1),
}


def rows_of(logits, target):
    """The log-probabilities of the targets and the entropies, (N,) each."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def policy_losses(policy, logits, target, advantage, old_logprob=None, ref_logprob=None):
    """Section 10 of the contract, line by line, (N,)."""
    logprob, entropy = rows_of(logits, target)
    ratio = (logprob - (logprob.detach() if old_logprob is None else old_logprob)).exp()
    if policy.kind == "clip":
        clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    elif policy.kind == "cispo":
        loss = -ratio.clamp(max=1 + policy.clip_high).detach() * advantage * logprob
    else:
        loss = -advantage * logprob
    if policy.kl:
        loss = loss + policy.kl * ((ref_logprob - logprob).exp() - (ref_logprob - logprob) - 1)
    return loss - policy.entropy * entropy


def per_token(case, *, seed=3, spread=0.3, ignored_nan=False):
    """An advantage, and log-probabilities near those of the targets, (N,) in fp32 (fp64 for fp64)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    counted = case.target != case.ignore_index
    with torch.no_grad():
        logits = F.linear(case.hidden.double(), case.head.double(), None if case.bias is None else case.bias.double())
        logprob, _ = rows_of(logits, case.target.where(counted, 0))

    def noise():
        return torch.randn(len(case.target), generator=generator, dtype=torch.float64)

    log_ratio = spread * noise()
    for bound in (0.8, 0.9, 1.1, 1.2, 1.25, 1.3):  # no rounding moves a ratio over its bound
        log_ratio += 0.06 * ((log_ratio - math.log(bound)).abs() < 0.03)
    tensors = {"advantage": noise(), "old_logprob": logprob - log_ratio, "ref_logprob": logprob + 0.5 * noise()}
    if ignored_nan:
        tensors = {name: tensor.where(counted, torch.nan) for name, tensor in tensors.items()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def dense(policy, case, tensors, *, dtype=None, reduction="mean", token_weight=None):
    """Value and gradients of the leaves, from full logits in ``dtype``, or in the case's dtype as plain code does."""
    leaves = case.leaves() if dtype is None else [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves()]
    logits = F.linear(*leaves)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counted = case.target != case.ignore_index
    tensors = {name: tensor if tensor is None else tensor.to(logits.dtype) for name, tensor in tensors.items()}
    tensors = {name: tensor if tensor is None else tensor.where(counted, 0) for name, tensor in tensors.items()}
    losses = policy_losses(policy, logits, case.target.where(counted, 0), **tensors)
    weight = torch.ones_like(losses) if token_weight is None else token_weight.to(losses.dtype)
    losses = (losses * weight).where(counted, 0)
    value = losses if reduction == "none" else losses.sum()
    if reduction == "mean" and counted.any():
        value = value / (weight * counted).sum()
    return value.detach(), torch.autograd.grad(value.sum(), leaves)
