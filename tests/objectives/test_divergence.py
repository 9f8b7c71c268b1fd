"""Divergences between a teacher and a student: values and gradients against the contract's formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import Teacher, linear_divergence, logits_loss
from chunked_ce.objectives import Divergence
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, chunks, problem
from tests.objectives.teachers import BETAS, KINDS, capped, divergence, reduced, teacher_of, teacher_tensors
from tests.precision import assert_gradients_no_worse, assert_no_worse

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def expected(case, teacher_logits, beta, *, reduction="mean", weight=None, softcap=None, num_tokens=None, **keywords):
    """The value and the gradients of the leaves of ``case`` in float64."""
    leaves = [x.detach().double().requires_grad_() for x in case.leaves()]
    logits = F.linear(*leaves) if len(leaves) > 1 else leaves[0]
    losses = divergence(capped(logits, softcap, **keywords), teacher_logits, beta)
    value = reduced(losses, case.target != -100, reduction, weight, num_tokens)
    upstream = torch.arange(1.0, 1 + value.numel(), dtype=torch.float64).view(value.shape)
    return value.detach(), torch.autograd.grad(value, leaves, upstream), upstream


def assert_right(value, leaves, want):
    wanted, gradients, upstream = want
    torch.testing.assert_close(value.double(), wanted, **CLOSE)
    for one, other in zip(torch.autograd.grad(value, leaves, upstream.to(value.dtype)), gradients, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_a_head(reduction, way, beta, kind):
    case, weight = problem(17, 6, 23, bias=True), torch.rand(17) + 0.5
    teacher, logits = teacher_of(kind, *teacher_tensors(17, 23))
    value = linear_divergence(
        case.hidden,
        case.head,
        teacher,
        target=case.target,
        beta=beta,
        linear_bias=case.bias,
        reduction=reduction,
        token_weight=weight,
        softcap=4.0,
        options=chunks(5, way),
    )
    assert value.dtype == torch.float32
    want = expected(case, logits, beta, reduction=reduction, weight=weight, softcap=4.0)
    assert_right(value, case.leaves(), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("softcaps", [(None, None), (None, 3.0), (2.0, None), (2.0, 3.0)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_scales_softcaps_and_temperatures(beta, softcaps, per_token, way):
    """Each head has a scale and a softcap of its own; the temperature divides the logits of both."""
    case = problem(17, 6, 23)
    temperature = torch.rand(17, dtype=torch.float64) + 0.5 if per_token else 1.7
    hidden, weight, bias = teacher_tensors(17, 23)
    own, of_teacher = softcaps
    teacher = Teacher(hidden, weight, bias, softcap=of_teacher, logit_scale=1.3)
    value = linear_divergence(
        case.hidden,
        case.head,
        teacher,
        target=case.target,
        beta=beta,
        softcap=own,
        logit_scale=0.7,
        temperature=temperature,
        options=chunks(5, way),
    )
    logits = capped(F.linear(hidden.double(), weight.double(), bias.double()), of_teacher, 1.3, temperature)
    assert_right(value, case.leaves(), expected(case, logits, beta, softcap=own, scale=0.7, temperature=temperature))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", BETAS)
def test_logits_that_exist(beta, kind):
    case = problem(17, 6, 23)
    logits = (case.hidden @ case.head.t()).detach().requires_grad_()
    teacher, of_teacher = teacher_of(kind, *teacher_tensors(17, 23))
    value = logits_loss(Divergence(beta), logits, case.target, teacher=teacher)
    want = expected(problem(17, 6, 23).fresh(hidden=logits, head=case.head.detach()), of_teacher, beta)
    assert_right(value, [logits], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_few_tokens_and_all_of_them(n, beta, kind):
    """Without targets all tokens count."""
    case = problem(n, 6, 23, ignored=0.0)
    teacher, logits = teacher_of(kind, *teacher_tensors(n, 23))
    for way in WAYS:
        value = linear_divergence(case.hidden, case.head, teacher, beta=beta, reduction="sum", options=chunks(4, way))
        assert_right(value, case.leaves(), expected(case, logits, beta, reduction="sum"))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_no_token_counts(way, beta):
    case = problem(7, 6, 23, ignored=1.1)
    teacher, _ = teacher_of("head", *teacher_tensors(7, 23))
    value = linear_divergence(case.hidden, case.head, teacher, target=case.target, beta=beta, options=chunks(4, way))
    assert value == 0
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(value, case.leaves()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_no_less_precise_than_plain_code(dtype, beta, way):
    """peers 15: against F.kl_div of log_softmax in the same dtype."""
    n, vocab = 256, 512
    case = problem(n, 64, vocab, dtype=dtype, ignored=0.0, spread=2.0)
    hidden, weight, _ = teacher_tensors(n, vocab, width=48, dtype=dtype, spread=2.0)
    value = linear_divergence(
        case.hidden, case.head, Teacher(hidden, weight), beta=beta, reduction="sum", options=chunks(64, way)
    )
    got = torch.autograd.grad(value, case.leaves())
    plain = plain_divergence(F.linear(case.hidden, case.head), F.linear(hidden, weight), beta)
    plain_gradients = torch.autograd.grad(plain, case.leaves())
    wanted, gradients, _ = expected(case, F.linear(hidden.double(), weight.double()), beta, reduction="sum")
    if dtype == torch.float64:  # the reference has its own errors
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
        for one, other in zip(got, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        return
    per_token = linear_divergence(case.hidden, case.head, Teacher(hidden, weight), beta=beta, reduction="none")
    plain_tokens = plain_divergence(F.linear(case.hidden, case.head), F.linear(hidden, weight), beta, reduction="none")
    wanted_tokens, _, _ = expected(case, F.linear(hidden.double(), weight.double()), beta, reduction="none")
    assert_no_worse(per_token, plain_tokens, wanted_tokens.numpy(), "values")
    gradients = [gradient.numpy() for gradient in gradients]
    assert_gradients_no_worse(got, plain_gradients, gradients, way, dtype)


def plain_divergence(student, teacher, beta, reduction="sum"):
    """What users write: log_softmax and F.kl_div on full logits in fp32 (fp64 for fp64)."""
    q, p = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (student, teacher))

    def kl_div(p, q):
        terms = F.kl_div(q, p, reduction="none", log_target=True)
        return terms.sum() if reduction == "sum" else terms.sum(-1)

    if beta == 0:
        return kl_div(p, q)
    if beta == 1:
        return kl_div(q, p)
    share = torch.tensor(beta, dtype=p.dtype)
    m = torch.logaddexp(p + share.log(), q + torch.log1p(-share))
    return beta * kl_div(p, m) + (1 - beta) * kl_div(q, m)
