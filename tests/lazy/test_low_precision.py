"""bf16 entropies of lazy logits are as close to float64 as those of plain logits: values and gradients."""

import copy

import pytest
import torch

from chunked_ce import ChunkOptions, LMHead
from tests.lazy.test_terms import ENTROPIES
from tests.precision import assert_no_worse

SPELLINGS = ["exp(logp) * logp", "softmax * log_softmax", "logsumexp - softmax * z", "Categorical", "at a temperature"]


def outcome(form, head, hidden):
    value = form(head(hidden))
    return value.detach(), *torch.autograd.grad(value.sum(), [hidden, *head.parameters()])


@pytest.mark.parametrize("name", SPELLINGS)
def test_entropies(name):
    torch.manual_seed(0)
    head = LMHead(32, 200, bias=True, options=ChunkOptions(chunk_size=32))
    torch.nn.init.normal_(head.weight, std=1 / 3)
    head = head.bfloat16()
    hidden = torch.randn(2, 20, 32).bfloat16().requires_grad_()
    ours = outcome(ENTROPIES[name], head, hidden)
    plain = outcome(ENTROPIES[name], head.eval(), hidden)
    exact = outcome(ENTROPIES[name], copy.deepcopy(head).double(), hidden.detach().double().requires_grad_())
    for what, *one in zip(("value", "hidden", "weight", "bias"), ours, plain, exact, strict=True):
        assert_no_worse(one[0], one[1], one[2].numpy(), what)
