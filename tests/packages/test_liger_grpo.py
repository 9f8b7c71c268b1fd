"""Liger's chunked GRPO and its kinds, from the same hidden states and head."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

from chunked_ce import linear_logprobs, linear_loss, objectives
from tests.cases import chunks
from tests.packages.comparison import assert_same, model, needs, responses

SEQUENCES, TIME, LONGEST = 6, 9, 12
POLICY = model(SEQUENCES, TIME)
TARGET = responses(SEQUENCES, TIME)
COUNTED = TARGET != -100
# (B,) in Liger, per token here. They do not add up to 0, where rounding would be all of an on-policy loss.
ADVANTAGE = torch.tensor([1.3, -0.8, 1.4, -0.3, 0.9, 0.7])

pytestmark = needs("objectives.PolicyGradient")


def near(spread, seed):
    """Log-probabilities of a policy nearby, (B, T): some ratios leave the bounds."""
    with torch.no_grad():
        logprob = linear_logprobs(POLICY.hidden, POLICY.weight, TARGET, linear_bias=POLICY.bias)
    return logprob + spread * torch.randn(logprob.shape, generator=torch.Generator().manual_seed(seed)) * COUNTED


OLD, REFERENCE = near(0.3, 1), near(0.5, 2)

# Each mean of Liger's as a reduction of ours.
PER_SEQUENCE = {"token_weight": 1 / COUNTED.sum(-1, keepdim=True).expand(TARGET.shape), "num_tokens": SEQUENCES}
MEANS = {
    "grpo": PER_SEQUENCE,
    "bnpo": {},
    "dapo": {},
    "dr_grpo": {"num_tokens": SEQUENCES * LONGEST},
    "cispo": {},
}


def check(loss_type, objective, *, low=0.2, high=0.2, beta=0.0, old=None, temperature=1.0, way="forward"):
    loss = LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=beta != 0,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        temperature=temperature,
    )
    reference = REFERENCE if beta else None
    tensors = {"old_logprob": old, "ref_logprob": reference, "advantage": ADVANTAGE[:, None].expand(TARGET.shape)}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    keywords = MEANS[loss_type] | ({} if temperature == 1 else {"temperature": temperature})

    def ours(hidden, weight, bias):
        given = {name: tensor.to(hidden.dtype) for name, tensor in tensors.items()}
        options = {"linear_bias": bias, "options": chunks(16, way)}
        return linear_loss(objective, hidden, weight, TARGET, **options, **keywords, **given)

    def theirs(hidden, weight, bias):
        ids, mask = TARGET.where(COUNTED, 0), COUNTED.float()
        given = {"bias": bias, "old_per_token_logps": old, "ref_per_token_logps": reference}
        return loss(hidden, weight, ids, mask, ADVANTAGE, **given)[0]

    assert_same(ours, theirs, POLICY)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_means(loss_type, way):
    """Not "luspo": Liger's counts the masked tokens there."""
    check(loss_type, objectives.PolicyGradient(), old=OLD, way=way)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_clip_bounds_of_their_own(loss_type):
    objective = objectives.PolicyGradient(clip_low=0.1, clip_high=0.4)
    check(loss_type, objective, low=0.1, high=0.4, old=OLD)


@pytest.mark.parametrize("old", [None, OLD], ids=["on policy", "off policy"])
def test_divergence_from_a_reference(old):
    check("grpo", objectives.PolicyGradient(kl=0.3), beta=0.3, old=old)


def test_on_policy():
    check("grpo", objectives.PolicyGradient())


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_cispo(kl):
    """Liger's epsilon_high is the bound of the ratio itself, not what it may exceed 1 by."""
    check("cispo", objectives.PolicyGradient("cispo", clip_high=0.25, kl=kl), high=1.25, beta=kl, old=OLD)


@needs("linear_loss(temperature)")
def test_temperature():
    check("dapo", objectives.PolicyGradient(), old=OLD, temperature=1.2)
