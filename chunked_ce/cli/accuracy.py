"""Gradient errors of losses too large for a float64 copy: the exact gradient of a few tokens and a few words.

Every token's log-sum-exp is computed in float64, block by block, so that what is compared is the gradient of the whole
loss over all its chunks; only the rows of it that are looked at are few. That costs 2 N V D operations in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.cli.problems import IGNORED, Problem

__all__ = ["Reference", "errors_of", "reference"]

_TOKENS, _WORDS = 64, 512  # looked at
_BLOCK_TOKENS, _BLOCK_WORDS = 2048, 8192


class Reference(NamedTuple):
    """The mean loss and rows of its gradients, in float64."""

    loss: float
    tokens: Tensor  # (t,) positions
    words: Tensor  # (w,)
    hidden_grad: Tensor  # (t, D)
    weight_grad: Tensor  # (w, D)


def reference(problem: Problem) -> Reference:
    """The exact mean loss and gradients: of tokens spread evenly, and of words of which half are targets."""
    hidden, weight, target = (tensor.detach() for tensor in problem)
    counted = target != IGNORED
    n = max(1, int(counted.sum()))
    x = hidden.double()
    lse = _log_sum_exp(x, weight)
    at_target = torch.cat(
        [
            (part * weight[words].double()).sum(-1)
            for part, words in zip(x.split(_BLOCK_TOKENS), target.clamp(min=0).split(_BLOCK_TOKENS), strict=True)
        ]
    )
    loss = ((lse - at_target) * counted).sum().item() / n

    tokens = counted.nonzero().squeeze(-1)
    tokens = tokens[torch.linspace(0, max(0, len(tokens) - 1), min(_TOKENS, len(tokens))).long().to(tokens.device)]
    hidden_grad = -weight[target[tokens]].double()
    for start in range(0, len(weight), _BLOCK_WORDS):
        block = weight[start : start + _BLOCK_WORDS].double()
        hidden_grad += (x[tokens] @ block.t() - lse[tokens, None]).exp() @ block

    targets = target[counted].unique()
    targets = targets[:: max(1, 2 * len(targets) // _WORDS)]
    others = torch.arange(0, len(weight), max(1, 2 * len(weight) // _WORDS), device=weight.device)
    words = torch.cat((targets, others)).unique()
    p = (x @ weight[words].double().t() - lse[:, None]).exp()  # (N, w)
    p -= (target[:, None] == words).double()
    p[~counted] = 0
    return Reference(loss, tokens, words, hidden_grad / n, p.t() @ x / n)


def errors_of(exact: Reference, loss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> dict[str, float]:
    """The loss's absolute error, and the gradients' errors in root mean square, as a share of the gradient's own."""
    return {
        "loss_error": abs(loss.item() - exact.loss),
        "hidden_grad_error": _relative(hidden_grad[exact.tokens], exact.hidden_grad),
        "weight_grad_error": _relative(weight_grad[exact.words], exact.weight_grad),
    }


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def _log_sum_exp(x: Tensor, weight: Tensor) -> Tensor:
    """(N,) over all words."""
    found = x.new_full((len(x),), -torch.inf)
    for start in range(0, len(weight), _BLOCK_WORDS):
        block = weight[start : start + _BLOCK_WORDS].double()
        for part, rows in zip(found.split(_BLOCK_TOKENS), x.split(_BLOCK_TOKENS), strict=True):
            part.copy_(torch.logaddexp(part, (rows @ block.t()).logsumexp(-1)))
    return found
