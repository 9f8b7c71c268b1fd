"""The formulas of preference tuning as the papers print them, with no thought for rounding.

In float64 they are the reference of `chunked_ce.preference`, in float32 the plain code whose error bounds its own.
Random arguments of each, too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce import preference


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta=0.1, label_smoothing=0.0):
    h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    return classified(beta * h, label_smoothing).mean()


def ipo(
    policy_chosen,
    policy_rejected,
    reference_chosen,
    reference_rejected,
    *,
    beta=0.1,
    chosen_length=1,
    rejected_length=1,
):
    chosen, rejected = policy_chosen / chosen_length, policy_rejected / rejected_length
    h = (chosen - rejected) - (reference_chosen / chosen_length - reference_rejected / rejected_length)
    return ((h - 1 / beta / 2) ** 2).mean()


def simpo(policy_chosen, policy_rejected, *, chosen_length, rejected_length, beta=2.0, gamma=0.5, label_smoothing=0.0):
    margin = beta * policy_chosen / chosen_length - beta * policy_rejected / rejected_length - gamma
    return classified(margin, label_smoothing).mean()


def orpo(policy_chosen, policy_rejected, *, chosen_length, rejected_length, beta=0.1, alpha=1.0, nll=None):
    p, q = (policy_chosen / chosen_length).exp(), (policy_rejected / rejected_length).exp()
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    nll = -(policy_chosen / chosen_length).mean() if nll is None else nll
    return alpha * nll + beta * -torch.sigmoid(odds_ratio.log()).log().mean()


def cpo(policy_chosen, policy_rejected, *, beta=0.1, alpha=1.0, nll=None, label_smoothing=0.0):
    nll = -policy_chosen.mean() if nll is None else nll
    return classified(beta * policy_chosen - beta * policy_rejected, label_smoothing).mean() + alpha * nll


def kto(
    policy_chosen,
    policy_rejected,
    reference_chosen,
    reference_rejected,
    *,
    kl=0.0,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    z = max(float(kl), 0.0)
    losses = []
    for policy, reference in zip(policy_chosen, reference_chosen, strict=True):
        losses.append(desirable_weight - desirable_weight * torch.sigmoid(beta * (policy - reference - z)))
    for policy, reference in zip(policy_rejected, reference_rejected, strict=True):
        losses.append(undesirable_weight - undesirable_weight * torch.sigmoid(beta * (z - (policy - reference))))
    return torch.stack(losses).mean()


def classified(logits, label_smoothing):
    """-log sigmoid(x) = log(1 + exp(-x))."""
    return (1 - label_smoothing) * (-logits).exp().log1p() + label_smoothing * logits.exp().log1p()


class Case(NamedTuple):
    """One call: the function by name, and keywords that are numbers. Its tensors are random."""

    name: str
    numbers: dict[str, float] = {}  # noqa: RUF012, never changed
    with_lengths: bool = False  # where a function may go without
    with_nll: bool = False

    def __str__(self):
        flags = ["lengths"] * self.with_lengths + ["nll"] * self.with_nll
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.numbers.items()), *flags])

    @property
    def ours(self) -> Callable:
        return getattr(preference, self.name)

    @property
    def plain(self) -> Callable:
        return globals()[self.name]

    def arguments(self, pairs: int, dtype=torch.float64, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves by name, which are differentiated, and the constants."""
        g = torch.Generator().manual_seed(seed)

        def sums(of, around=None):
            spread = torch.randn(pairs, generator=g, dtype=torch.float64)
            return (-2.0 * of + spread if around is None else around + 2 * spread).to(dtype).double()

        lengths = [torch.randint(5, 60, (pairs,), generator=g) for _ in range(2)]
        leaves = {"policy_chosen": sums(lengths[0]), "policy_rejected": sums(lengths[1])}
        constants = {}
        if self.name in ("dpo", "ipo", "kto"):
            constants = {name.replace("policy", "reference"): sums(None, leaf) for name, leaf in leaves.items()}
        if self.with_lengths or self.name in ("simpo", "orpo"):
            constants |= {"chosen_length": lengths[0], "rejected_length": lengths[1]}
        if self.with_nll:
            leaves["nll"] = torch.rand((), generator=g, dtype=torch.float64).to(dtype).double()
        leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
        floating = {name: x.to(dtype) for name, x in constants.items() if x.is_floating_point()}
        return leaves, constants | floating


CASES = [
    Case("dpo"),
    Case("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    Case("ipo"),
    Case("ipo", {"beta": 0.3}, with_lengths=True),
    Case("simpo"),
    Case("simpo", {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1}),
    Case("orpo"),
    Case("orpo", {"beta": 0.4, "alpha": 0.5}),
    Case("orpo", {"beta": 1.0}, with_nll=True),
    Case("cpo"),
    Case("cpo", {"beta": 0.2, "alpha": 0.0, "label_smoothing": 0.1}),
    Case("cpo", {"alpha": 2.0}, with_nll=True),
    Case("kto"),
    Case("kto", {"kl": 0.7}),
    Case("kto", {"kl": -0.7, "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.5}),
]
