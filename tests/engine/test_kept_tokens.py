"""`ChunkOptions(ignored="mask")`: ignored tokens are kept and masked; rows of logits are padded as on a device."""

import functools

import pytest
import torch

from chunked_ce import (
    ChunkOptions,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_statistics,
)
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
KEPT = {"ignored": "mask"}
TORCH = ChunkOptions(backend="torch", **KEPT)
MASKS = ("none", "all", "one", "all but one", "half")


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    def scratch(tokens, words, *, dtype, device, keep=False):
        return torch.full((tokens, words + 5), torch.nan, dtype=dtype, device=device)[:, :words]

    monkeypatch.setattr(sources, "logits_scratch", scratch)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms) or "plain")
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, terms):
    check_loss(problem(13, 5, 11, bias=True), reduction=reduction, options=chunks(4, way, **KEPT), **terms)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_filter(way):
    """Where every token counts the chunks are the same, and so are the words that they keep."""
    case = problem(24, 16, 300, spread=6.0, ignored=0.0)
    found, dropping = (
        gradients(case.loss(options=chunks(10, way, gradient_filter=1e-3, ignored=ignored)), case)
        for ignored in ("mask", "drop")
    )
    exact = gradients(case.loss(options=chunks(10, way, **KEPT)), case)
    torch.testing.assert_close(found, dropping)
    assert not torch.allclose(found[1], exact[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_divergence(way, beta, kind):
    """Whatever the teacher has for ignored tokens, it reaches nothing."""
    case = problem(13, 5, 11)
    teacher, _ = teacher_of(kind, *teacher_tensors(13, 11))
    name = "hidden" if kind == "head" else kind
    getattr(teacher, name)[case.target == -100] = torch.nan

    def found(ignored):
        options = chunks(4, way, backend="torch", ignored=ignored)
        value = linear_divergence(case.hidden, case.head, teacher, target=case.target, beta=beta, options=options)
        return value, *gradients(value, case)

    kept = found("mask")
    assert all(part.isfinite().all() for part in kept)
    torch.testing.assert_close(kept, found("drop"))


def test_linear_logprobs():
    check_logprobs(problem(13, 5, 11), options=chunks(4, **KEPT), entropy=True, softcap=3.0)


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
        assert_equal(*(gradients(x.loss(options=chunks(4, way, **KEPT)), x) for x in (clean, dirty)))
    logits = torch.randn(13, 11)
    logits[lost] = garbage
    logits.requires_grad_()
    value = cross_entropy(logits, case.target, options=TORCH)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all() and gradient[lost].count_nonzero() == 0


@pytest.mark.parametrize("way", WAYS)
def test_no_token_counts(way):
    case = problem(13, 5, 11, ignored=1.1)
    value = case.loss(options=chunks(4, way, **KEPT))
    assert value == 0
    for grad in gradients(value, case):
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("target", [11, -1])
def test_target_out_of_range(target):
    case = problem(13, 5, 11)
    case.target[2] = target
    with pytest.raises(IndexError, match=rf"position 2 .* is {target}, allowed are \[0, 11\)"):
        case.loss(options=chunks(4, **KEPT))


# ---- masked and dropped tokens give the same results beyond rounding ----


def masked(target, which):
    """The target with this choice of its tokens ignored."""
    n = len(target)
    counted = {"none": range(n), "all": (), "one": (n // 2,), "all but one": range(1, n), "half": range(0, n, 2)}
    keep = torch.zeros(n, dtype=torch.bool)
    keep[list(counted[which])] = True
    return target.masked_fill(~keep, -100)


def depths(case, options):
    hidden, target = (list(x.split([4, len(x) - 4])) for x in (case.hidden, case.target))
    return linear_cross_entropy(hidden, case.head, target, options=options)


def sampled(case, options):
    ids = torch.stack([case.target, case.target.roll(1)], -1)
    support = torch.arange(4).expand(len(case.target), 4)
    found = linear_statistics(case.hidden, case.head, ids, options=options).logprob
    over = linear_statistics(case.hidden, case.head, ids, outputs=("logprob", "lse"), support=support, options=options)
    return torch.stack([found.sum(), over.logprob.sum(), over.lse.sum()])


def adapted(case, options):
    low = torch.linspace(-1, 1, len(case.target) * 2).view(-1, 2), torch.linspace(-1, 1, len(case.head) * 2).view(-1, 2)
    return linear_cross_entropy(case.hidden, case.head, case.target, linear_adapter=low, options=options)


def existing(case, options):
    scores = case.hidden @ case.head.t()
    return cross_entropy(scores, case.target, label_smoothing=0.1, options=options)


def tempered(case, options):
    temperature = torch.linspace(0.5, 2, len(case.target)).where(case.target >= 0, 0)
    return torch.stack(
        linear_logprobs(
            case.hidden, case.head, case.target, temperature=temperature, return_entropy=True, options=options
        )
    )


def with_stats(case, options):
    loss, stats = case.loss(options=options, return_stats=True, token_weight=torch.linspace(0, 1, len(case.target)))
    assert stats.num_correct <= (case.target >= 0).sum()
    return torch.stack([loss, stats.loss_sum, stats.entropy_sum, stats.num_correct])


FUNCTIONS = (depths, sampled, adapted, existing, tempered, with_stats)


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_as_if_dropped(function, which):
    for n, vocab, keywords in ((13, 11, {"chunk_size": 4}), (7, 50, {}), (9, 17, {"gradients": "backward"})):
        case = problem(n, 5, vocab, ignored=0.0, seed=n)
        case = case.fresh(target=masked(case.target, which))
        found = []
        for ignored in ("mask", "drop", "auto"):
            value = function(case, ChunkOptions(ignored=ignored, **keywords))
            found.append((value, *torch.autograd.grad(value.sum(), (case.hidden, case.head), materialize_grads=True)))
        assert_equal(found[1], found[2])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
        if function is not sampled:  # where a token has another id too
            assert found[0][1][case.target == -100].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_statistics(dtype):
    """A token's bits are the same, whatever the tokens that count and whether the others are kept."""
    case = problem(40, 16, 100, dtype=dtype)
    options = functools.partial(ChunkOptions, invariant=True)
    kept, dropped = (case.logprobs(options=options(ignored=ignored)) for ignored in ("mask", "drop"))
    assert torch.equal(kept, dropped)
