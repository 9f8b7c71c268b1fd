"""The plan of the chunks and the dtype of their sums agree."""

import pytest
import torch

from chunked_ce import linear_cross_entropy, plan
from tests.cases import full_loss


@pytest.mark.parametrize("train_head", [True, False])
def test_bias_is_summed_in_fp32_over_chunks(monkeypatch, train_head):
    """Without a gradient of the head there is no sum of it whose memory one chunk of logits could take."""
    monkeypatch.setattr(plan, "_LEAST_BUDGET", 1024)
    hidden = torch.randn(512, 512).bfloat16()
    head = (torch.randn(64, 512) / 20).bfloat16().requires_grad_(train_head)
    bias = torch.zeros(64, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(512, dtype=torch.long)
    exact = bias.detach().double().requires_grad_()
    full_loss(hidden.double(), head.detach().double(), target, exact).backward()
    errors = []
    for loss in (
        linear_cross_entropy(hidden, head, target, linear_bias=bias),
        full_loss(hidden, head, target, bias),
    ):
        (gradient,) = torch.autograd.grad(loss, bias)
        errors.append((gradient.double() - exact.grad).norm())
    assert errors[0] <= 1.05 * errors[1]
