"""The way of an accelerator on a CPU: ignored tokens are kept and masked, and rows of logits are padded."""

import pytest
import torch

from chunked_ce import ChunkOptions, cross_entropy, devices, linear_divergence
from chunked_ce.engine import sources
from tests.cases import (
    REDUCTIONS_AND_WAYS,
    WAYS,
    assert_equal,
    check_cross_entropy,
    check_logprobs,
    check_loss,
    chunks,
    gradients,
    problem,
)
from tests.objectives.teachers import KINDS, teacher_of, teacher_tensors

TERMS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5},
    {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 2.0, 11), "token_weight": torch.linspace(0.1, 1.0, 13)},
)
TORCH = ChunkOptions(backend="torch")


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    def padded(tokens, words, *, dtype, device):
        return torch.full((tokens, words + 5), torch.nan, dtype=dtype, device=device)[:, :words]

    monkeypatch.setattr(devices, "drops_ignored", lambda device: False)
    monkeypatch.setattr(sources, "logits_scratch", padded)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms) or "plain")
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, terms):
    check_loss(problem(13, 5, 11, bias=True), reduction=reduction, options=chunks(4, way), **terms)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_filter(way, monkeypatch):
    """Where every token counts the chunks are those of a CPU, and so are the words that they keep."""
    case = problem(24, 16, 300, spread=6.0, ignored=0.0)
    options = chunks(10, way, gradient_filter=1e-3)
    found = gradients(case.loss(options=options), case)
    exact = gradients(case.loss(options=chunks(10, way)), case)
    monkeypatch.undo()
    torch.testing.assert_close(found, gradients(case.loss(options=options), case))
    assert not torch.allclose(found[1], exact[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_divergence(way, beta, kind, monkeypatch):
    """Whatever the teacher has for ignored tokens, it reaches nothing."""
    case = problem(13, 5, 11)
    teacher, _ = teacher_of(kind, *teacher_tensors(13, 11))
    name = "hidden" if kind == "head" else kind
    getattr(teacher, name)[case.target == -100] = torch.nan
    options = chunks(4, way, backend="torch")

    def found():
        value = linear_divergence(case.hidden, case.head, teacher, target=case.target, beta=beta, options=options)
        return value, *gradients(value, case)

    kept = found()
    assert all(part.isfinite().all() for part in kept)
    monkeypatch.undo()
    torch.testing.assert_close(kept, found())


def test_linear_logprobs():
    check_logprobs(problem(13, 5, 11), options=chunks(4), entropy=True, softcap=3.0)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(reduction, terms):
    logits = (3 * torch.randn(13, 11)).requires_grad_()
    target = torch.randint(11, (13,))
    target[3] = -100
    check_cross_entropy(logits, target, reduction=reduction, options=TORCH, **terms)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_in_ignored_tokens(garbage):
    case = problem(13, 5, 11)
    lost = case.target == -100
    for way in WAYS:
        clean, dirty = case.fresh(), case.fresh()
        with torch.no_grad():
            dirty.hidden[lost] = garbage
        assert_equal(*(gradients(x.loss(options=chunks(4, way)), x) for x in (clean, dirty)))
    logits = torch.randn(13, 11)
    logits[lost] = garbage
    logits.requires_grad_()
    value = cross_entropy(logits, case.target)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all() and gradient[lost].count_nonzero() == 0


@pytest.mark.parametrize("way", WAYS)
def test_no_token_counts(way):
    case = problem(13, 5, 11, ignored=1.1)
    value = case.loss(options=chunks(4, way))
    assert value == 0
    for grad in gradients(value, case):
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("target", [11, -1])
def test_target_out_of_range(target):
    case = problem(13, 5, 11)
    case.target[2] = target
    with pytest.raises(RuntimeError, match=r"neither in \[0, V\) nor ignore_index"):
        case.loss()
