"""Liger's chunked losses of preference tuning, from the same hidden states and head."""

import pytest
import torch
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

from chunked_ce import linear_logprobs, preference
from tests.cases import chunks
from tests.packages.comparison import assert_same, model, responses

PAIRS, TIME = 4, 9
TARGET = responses(2 * PAIRS, TIME)
POLICY, REFERENCE = model(2 * PAIRS, TIME), model(2 * PAIRS, TIME, width=24, seed=1)
LENGTHS = dict(zip(("chosen_length", "rejected_length"), (TARGET != -100).sum(-1).chunk(2), strict=True))


def sums(hidden, weight, bias):
    """Of log-probabilities, (2B,)."""
    return linear_logprobs(hidden, weight, TARGET, linear_bias=bias, options=chunks(16)).sum(-1)


def reference_sums(dtype):
    return sums(*(x.to(dtype) for x in REFERENCE))


def mean_over_tokens(policy_chosen):
    """Liger's likelihood term: over all chosen tokens of the batch."""
    return -policy_chosen.sum() / LENGTHS["chosen_length"].sum()


def liger(loss):
    """Its value; the statistics that come with it are left out."""
    return lambda hidden, weight, bias: loss(weight, hidden, TARGET, bias)[0]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_dpo(beta, nll, chunk_size):
    """Liger can add the likelihood of the chosen responses."""
    loss = LigerFusedLinearDPOLoss(
        beta=beta, compute_nll_loss=nll, alpha=0.3 if nll else 1.0, compiled=False, chunk_size=chunk_size
    )

    def ours(*leaves):
        chosen, rejected = sums(*leaves).chunk(2)
        value = preference.dpo(chosen, rejected, *reference_sums(chosen.dtype).chunk(2), beta=beta)
        return value + 0.3 * mean_over_tokens(chosen) if nll else value

    def theirs(hidden, weight, bias):
        return loss(weight, hidden, TARGET, bias, REFERENCE.hidden, REFERENCE.weight, REFERENCE.bias)[0]

    assert_same(ours, theirs, POLICY)


@pytest.mark.parametrize("numbers", [{}, {"beta": 2.5, "gamma": 1.2, "label_smoothing": 0.1}], ids=str)
def test_simpo(numbers):
    """Liger's beta is 0.1 unless it is given; the paper's is 2 to 10."""
    numbers = {"beta": 0.1} | numbers
    loss = LigerFusedLinearSimPOLoss(compute_nll_loss=False, compiled=False, **numbers)
    assert_same(lambda *leaves: preference.simpo(*sums(*leaves).chunk(2), **LENGTHS, **numbers), liger(loss), POLICY)


@pytest.mark.parametrize("numbers", [{}, {"beta": 0.8}], ids=str)
@pytest.mark.parametrize("nll", [False, True])
def test_orpo(numbers, nll):
    loss = LigerFusedLinearORPOLoss(compute_nll_loss=nll, compiled=False, **numbers)

    def ours(*leaves):
        chosen, rejected = sums(*leaves).chunk(2)
        likelihood = {"nll": mean_over_tokens(chosen)} if nll else {"alpha": 0.0}
        return preference.orpo(chosen, rejected, **LENGTHS, **likelihood, **numbers)

    assert_same(ours, liger(loss), POLICY)


@pytest.mark.parametrize("numbers", [{}, {"beta": 0.4, "alpha": 0.6, "label_smoothing": 0.2}], ids=str)
def test_cpo(numbers):
    """Of sums, as in the paper; `average_log_prob` would make them means."""
    loss = LigerFusedLinearCPOLoss(compiled=False, **numbers)

    def ours(*leaves):
        chosen, rejected = sums(*leaves).chunk(2)
        return preference.cpo(chosen, rejected, nll=mean_over_tokens(chosen), **numbers)

    assert_same(ours, liger(loss), POLICY)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kl", [0.0, 1.3])
def test_kto(beta, kl):
    """Liger takes any reference point, the paper's is at least 0; it has no weights of the two kinds."""
    desirable = torch.tensor([True, False, True, True, False, False, True, False])
    loss = LigerFusedLinearKTOLoss(beta=beta, use_ref_model=True, compiled=False)

    def ours(*leaves):
        policy = sums(*leaves)
        reference = reference_sums(policy.dtype)
        of_both = policy[desirable], policy[~desirable], reference[desirable], reference[~desirable]
        return preference.kto(*of_both, kl=kl, beta=beta)

    def theirs(hidden, weight, bias):
        reference = {"ref_input": REFERENCE.hidden, "ref_weight": REFERENCE.weight, "ref_bias": REFERENCE.bias}
        return loss(hidden, weight, TARGET, bias, desirable, kl=torch.tensor(kl), **reference)[0]

    assert_same(ours, theirs, POLICY)
