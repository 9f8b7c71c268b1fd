"""The reference itself against torch's float64 autograd: the tests are worth what it is worth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.cases import array, problem
from tests.reference import rows

OPTIONS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.3},
    "weight": {"weight": True},
    "token_weight": {"token_weight": True},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": -0.7},
    "ignore_index": {"ignore_index": 3},
    "all": {
        "label_smoothing": 0.2,
        "weight": True,
        "token_weight": True,
        "z_loss": 0.02,
        "softcap": 3.0,
        "logit_scale": 1.7,
        "ignore_index": 0,
    },
}


def composed(
    case, *, weight=None, token_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
    logit_scale=1.0,
):  # fmt: skip
    """Loss, log-probability, entropy per token (N,) and the denominator, written in torch operations."""
    z = logit_scale * F.linear(case.hidden, case.head, case.bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counted = case.target != ignore_index
    y = torch.where(counted, case.target, 0)
    vocab = z.shape[1]
    w = torch.ones(vocab, dtype=z.dtype) if weight is None else weight
    t = torch.ones(len(y), dtype=z.dtype) if token_weight is None else token_weight
    logp = z.log_softmax(1)
    nll = F.nll_loss(logp, y, reduction="none")
    loss = (1 - label_smoothing) * w[y] * nll - label_smoothing / vocab * (logp * w).sum(1)
    loss = t * (loss + z_loss * z.logsumexp(1) ** 2)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    return loss * counted, -nll * counted, entropy * counted, (t * w[y] * counted).sum()


def tensors(options, n, vocab):
    sizes = {"weight": vocab, "token_weight": n}
    return {k: torch.rand(sizes[k], dtype=torch.float64) + 0.5 if v is True else v for k, v in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_equals_autograd(options):
    ignore_index = options.get("ignore_index", -100)
    case = problem(17, 5, 11, dtype=torch.float64, bias=True, ignore_index=ignore_index)
    options = tensors(options, 17, 11)
    reference = case.rows(**{k: v for k, v in options.items() if k != "ignore_index"})
    *values, denominator = composed(case, **options)
    assert 0 < reference.counted.sum() < 17
    np.testing.assert_allclose(reference.share.sum(), denominator, rtol=1e-13)
    upstream = torch.randn(17, dtype=torch.float64)
    for name, value in zip(("loss", "logprob", "entropy"), values, strict=True):
        np.testing.assert_allclose(getattr(reference, name), array(value), rtol=1e-12, atol=1e-13)
        expected = torch.autograd.grad(value, case.leaves(), upstream, retain_graph=True)
        gradients = reference.gradients(name, array(case.hidden), array(case.head), array(upstream))
        for (gradient, scale), want in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(gradient, array(want), rtol=1e-11, atol=1e-13)
            assert (abs(gradient) <= scale).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_equals_torch_cross_entropy(reduction, label_smoothing, weighted):
    case = problem(17, 5, 11, dtype=torch.float64, ignore_index=2)
    options = {"weight": torch.rand(11, dtype=torch.float64)} if weighted else {}
    options |= {"label_smoothing": label_smoothing, "ignore_index": 2}
    logits = F.linear(case.hidden, case.head).detach().requires_grad_()
    expected = F.cross_entropy(logits, case.target, reduction=reduction, **options)
    reference = rows(
        array(logits), array(case.target), **{k: array(v) if k == "weight" else v for k, v in options.items()}
    )
    np.testing.assert_allclose(reference.reduce(reduction)[0], array(expected), rtol=1e-13, atol=1e-14)
    (gradient,) = torch.autograd.grad(expected, logits, torch.ones_like(expected))
    coefficient = reference.coefficient(reduction)[:, None]
    np.testing.assert_allclose(coefficient * reference.d_loss, array(gradient), rtol=1e-12, atol=1e-14)


def test_reference_stats():
    case = problem(23, 4, 9, dtype=torch.float64)
    weight, token_weight = torch.rand(9, dtype=torch.float64), torch.rand(23, dtype=torch.float64)
    stats = case.rows(weight=weight, token_weight=token_weight).stats()
    loss, _, entropy, denominator = composed(case, weight=weight, token_weight=token_weight)
    logits = F.linear(case.hidden, case.head)
    counted = case.target >= 0
    expected = {
        "loss_sum": loss.sum(),
        "num_tokens": denominator,
        "num_correct": (logits.argmax(1) == case.target).sum(),
        "entropy_sum": entropy.sum(),
        "lse_max": logits.logsumexp(1)[counted].max(),
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(stats[name], value.item(), rtol=1e-13)
