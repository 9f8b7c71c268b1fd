"""Gradient errors at sizes too large for a float64 copy: the exact gradient of a few tokens and vocabulary entries.

Every token's log-sum-exp is computed in float64, block by block, so the gradient compared is that of the whole loss
over all its chunks; only a few of its rows are looked at. That costs 2 N V D operations in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.cli.synthetic_inputs import IGNORED, LossInputs

__all__ = ["Reference", "errors_of", "gradient_of", "reference", "relative_error"]

_TOKENS, _ENTRIES = 64, 512  # whose gradients are compared
_BLOCK_TOKENS, _BLOCK_ENTRIES = 2048, 8192


class Reference(NamedTuple):
    """The mean loss and rows of its gradients, in float64."""

    loss: float
    tokens: Tensor  # (t,) positions
    entries: Tensor  # (e,) ids
    hidden_grad: Tensor  # (t, D)
    weight_grad: Tensor  # (e, D)


def reference(inputs: LossInputs) -> Reference:
    """The exact mean loss, and gradients of tokens spread evenly and of entries of which half are targets."""
    hidden, weight, target = (tensor.detach() for tensor in inputs)
    counted = target != IGNORED
    n = max(1, int(counted.sum()))
    x = hidden.double()
    lse = _log_sum_exp(x, weight)
    blocks = zip(x.split(_BLOCK_TOKENS), target.clamp(min=0).split(_BLOCK_TOKENS), strict=True)
    at_target = torch.cat([(rows * weight[ids].double()).sum(-1) for rows, ids in blocks])
    loss = ((lse - at_target) * counted).sum().item() / n

    tokens = counted.nonzero().squeeze(-1)
    tokens = tokens[torch.linspace(0, max(0, len(tokens) - 1), min(_TOKENS, len(tokens))).long().to(tokens.device)]
    hidden_grad = -weight[target[tokens]].double()
    for block in weight.split(_BLOCK_ENTRIES):
        block = block.double()
        hidden_grad += (x[tokens] @ block.t() - lse[tokens, None]).exp() @ block

    targets = target[counted].unique()
    targets = targets[:: max(1, 2 * len(targets) // _ENTRIES)]
    others = torch.arange(0, len(weight), max(1, 2 * len(weight) // _ENTRIES), device=weight.device)
    entries = torch.cat((targets, others)).unique()
    p = (x @ weight[entries].double().t() - lse[:, None]).exp()  # (N, e)
    p -= (target[:, None] == entries).double()
    p[~counted] = 0
    return Reference(loss, tokens, entries, hidden_grad / n, p.t() @ x / n)


def errors_of(exact: Reference, loss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> dict[str, float]:
    """The loss's absolute error, and the gradients' errors in root mean square, as a share of the gradient's own."""
    return {
        "loss_error_nats": abs(loss.item() - exact.loss),
        "hidden_grad_relative_error": relative_error(hidden_grad[exact.tokens], exact.hidden_grad),
        "weight_grad_relative_error": relative_error(weight_grad[exact.entries], exact.weight_grad),
    }


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The distance in root mean square, as a share of the exact value's own."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient that a backward pass has left."""
    assert leaf.grad is not None, "no backward pass has reached this tensor"
    return leaf.grad


def _log_sum_exp(x: Tensor, weight: Tensor) -> Tensor:
    """(N,) over all vocabulary entries."""
    lse = x.new_full((len(x),), -torch.inf)
    for block in weight.split(_BLOCK_ENTRIES):
        block = block.double()
        for part, rows in zip(lse.split(_BLOCK_TOKENS), x.split(_BLOCK_TOKENS), strict=True):
            part.copy_(torch.logaddexp(part, (rows @ block.t()).logsumexp(-1)))
    return lse
