"""Teachers for the tests of divergences, and the formulas in plain torch."""

import math

import torch
import torch.nn.functional as F

from chunked_ce import Teacher

BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)
KINDS = ("head", "logits", "probabilities")


def teacher_tensors(n, vocab, *, width=9, dtype=torch.float32, seed=1, spread=1.0):
    """Hidden states (n, width), weight (vocab, width) and bias (vocab,)."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, width), (vocab, width), (vocab,))
    )
    return hidden.to(dtype), (spread * width**-0.5 * weight).to(dtype), bias.to(dtype)


def teacher_of(kind, hidden, weight, bias, **keywords):
    """The teacher, and its logits before scale and softcap in float64."""
    logits = F.linear(*(x.double() for x in (hidden, weight, bias)))
    if kind == "head":
        return Teacher(hidden, weight, bias, **keywords), logits
    logits = logits.to(hidden.dtype)
    if kind == "logits":
        return Teacher(logits=logits, **keywords), logits.double()
    probabilities = logits.softmax(-1)
    return Teacher(probabilities=probabilities, **keywords), probabilities.double().log()


def capped(logits, softcap=None, scale=1.0, temperature=1.0):
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / (temperature if isinstance(temperature, float) else temperature.unsqueeze(-1))


def divergence(student, teacher, beta):
    """The formulas of the contract, (n,), from logits (n, V)."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def kl(p, q):
    """KL(p || q) of log-probabilities, where a probability of 0 adds 0."""
    terms = p.where(p > -torch.inf, 0) - q
    return (p.exp() * terms.where(p > -torch.inf, 0)).sum(-1)


def reduced(losses, counted, reduction="mean", weight=None, num_tokens=None):
    weight = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    losses = (losses * weight).where(counted, 0)
    if reduction == "none":
        return losses
    denominator = (weight * counted).sum() if num_tokens is None else num_tokens
    return losses.sum() / (denominator if reduction == "mean" else 1)
