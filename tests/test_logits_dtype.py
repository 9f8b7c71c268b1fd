"""`ChunkOptions(logits_dtype=torch.float32)`: logits straight from the product of narrow factors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import (
    ChunkOptions,
    LMHead,
    Teacher,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.plan import Plan, Settings, predict_memory
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, gradients, problem
from tests.distributed.threads import run_threads
from tests.objectives.users_own import Focal
from tests.precision import LOW, assert_gradients_no_worse, assert_no_worse, errors, plain_and_expected
from tests.test_work import train, work

WIDE = functools.partial(ChunkOptions, logits_dtype=torch.float32)
CHUNKS = (200, 33)
OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit")


def dense(case, dtype, softcap=None):
    """Log-probabilities of every entry, from factors cast to ``dtype``."""
    bias = None if case.bias is None else case.bias.to(dtype)
    z = F.linear(case.hidden.to(dtype), case.head.to(dtype), bias)
    z = z if dtype == torch.float64 else z.float()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)


def of_targets(case, logp):
    counted = case.target != -100
    return logp.gather(1, case.target.clamp(min=0)[:, None])[:, 0].where(counted, 0)


# --- the error of a log-probability ---


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_errors_of_log_probabilities(dtype, size, softcap):
    """No worse than fp32 factors in plain code, and far below what rounded logits have."""
    case = problem(200, 256, 501, dtype=dtype, bias=True, spread=4.0)
    exact, wide, narrow = (of_targets(case, dense(case, to, softcap)) for to in (torch.float64, torch.float32, dtype))
    found = case.logprobs(options=WIDE(chunk_size=size), softcap=softcap)
    assert_no_worse(found, wide, array(exact))
    (rms, most), (of_narrow, _) = errors(found, array(exact)), errors(narrow, array(exact))
    assert most < 5e-6 and rms < of_narrow / 300
    assert errors(case.logprobs(options=ChunkOptions(size), softcap=softcap), array(exact))[0] > 300 * rms


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_losses_and_gradients(dtype, bias, size, reduction, way):
    """Gradients of logits stay narrow: theirs are no worse than the plain loss's."""
    case = problem(200, 64, 501, dtype=dtype, bias=bias, spread=2.0)
    (_, of_plain), (expected, of_expected) = plain_and_expected(case, reduction=reduction)
    value = case.loss(reduction=reduction, options=WIDE(size, gradients=way))
    assert value.dtype == torch.float32
    if reduction == "none":
        assert_no_worse(value, -of_targets(case, dense(case, torch.float32)), expected)
    else:
        scale = abs(expected)
        assert abs(value.item() - expected) <= 2e-6 * scale
    found = gradients(value, case, torch.ones_like(value))
    assert {grad.dtype for grad in found} == {dtype}
    assert_gradients_no_worse(found, of_plain, of_expected, way, dtype)


@pytest.mark.parametrize("way", WAYS)
def test_logits_beyond_the_range_of_fp16(way):
    case = problem(24, 64, 50, dtype=torch.float16, spread=1.0)
    with torch.no_grad():
        case.hidden[0] *= 60.0
        case.head[:25] *= 60.0
        case.hidden[0].copy_(case.head[3] * 30)
    assert F.linear(case.hidden, case.head).abs().amax() == torch.inf
    plain = F.linear(*(leaf.detach().double().requires_grad_() for leaf in case.leaves()))
    assert plain.abs().amax() > 65504
    value = case.loss(options=WIDE(7, gradients=way))
    expected = F.cross_entropy(plain, case.target)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(value, case))
    assert not case.loss(options=ChunkOptions(7, gradients=way)).isfinite()


def test_a_bias_is_not_rounded():
    """Under autocast the factors are rounded, the bias is added to fp32 logits as it is."""
    case = problem(30, 16, 40, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.logprobs(options=WIDE())
    rounded = case.fresh(hidden=case.hidden.bfloat16(), head=case.head.bfloat16())
    exact = of_targets(rounded, dense(rounded, torch.float64))
    assert errors(found, array(exact))[1] < 2e-6


# --- every function ---


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_statistics(dtype):
    case = problem(40, 64, 301, dtype=dtype, ignored=0.0, spread=3.0)
    logp = dense(case, torch.float64)
    p = logp.exp()
    z = F.linear(case.hidden.double(), case.head.double())
    want = [
        of_targets(case, logp),
        -(p * logp).sum(-1),
        z.logsumexp(-1),
        p.square().sum(-1).log(),
        z.mean(-1),
    ]
    arguments = case.hidden, case.head, case.target
    found = linear_statistics(*arguments, outputs=OUTPUTS, options=WIDE(7))
    for name, right in zip(OUTPUTS, want, strict=True):
        assert errors(getattr(found, name), array(right))[1] < 1e-5, name
    ids = torch.randint(301, (40, 5))
    found = linear_statistics(*arguments[:2], ids, options=WIDE(7)).logprob
    assert errors(found, array(logp.gather(1, ids)))[1] < 1e-5
    found = linear_statistics(*arguments[:2], ids, support=ids, options=WIDE(7)).logprob
    same = linear_statistics(*arguments[:2], ids, support=ids, options=ChunkOptions(7)).logprob
    assert torch.equal(found, same)  # the products of a support are in fp32 anyway


@pytest.mark.parametrize("way", WAYS)
def test_objectives(way):
    case = problem(40, 64, 301, dtype=torch.bfloat16, ignored=0.0, spread=3.0)
    losses = -of_targets(case, dense(case, torch.float64))
    expected = ((1 - torch.exp(-losses)) ** 2 * losses).mean()
    value = linear_loss(Focal(), case.hidden, case.head, case.target, options=WIDE(7, gradients=way))
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)


def test_teachers():
    """The products of both heads are fp32 logits."""
    case, other = (problem(40, 64, 301, dtype=torch.bfloat16, spread=3.0, seed=seed) for seed in (0, 1))
    teacher = Teacher(hidden=other.hidden, weight=other.head)
    q, p = dense(case, torch.float64), dense(other, torch.float64)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    found = linear_divergence(case.hidden, case.head, teacher, options=WIDE(7))
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    found.backward()
    leaf = F.linear(case.hidden.detach().double(), case.head.double())
    want = ((leaf.softmax(-1) - p.exp()) @ case.head.double()) / 40
    assert (case.hidden.grad.double() - want).norm() < 8e-3 * want.norm()


@pytest.mark.parametrize("way", WAYS)
def test_adapters_and_depths(way):
    """The products of all factors are summed in fp32."""
    case, low_rank = problem(40, 64, 301, dtype=torch.bfloat16, spread=3.0), problem(40, 8, 301, dtype=torch.bfloat16)
    z = F.linear(case.hidden.double(), case.head.double()) + F.linear(low_rank.hidden.double(), low_rank.head.double())
    expected = -of_targets(case, z.log_softmax(-1))
    keywords = {"options": WIDE(7, gradients=way), "reduction": "sum"}
    adapter = low_rank.hidden, low_rank.head
    value = case.loss(linear_adapter=adapter, **keywords)
    torch.testing.assert_close(value.double(), expected.sum(), rtol=2e-7, atol=0)
    depths = [case.hidden[:15], case.hidden[15:]], case.head, [case.target[:15], case.target[15:]]
    value = linear_cross_entropy(*depths, linear_adapter=([adapter[0][:15], adapter[0][15:]], adapter[1]), **keywords)
    torch.testing.assert_close(value.double(), expected.sum(), rtol=2e-7, atol=0)
    if way == "backward":
        found = case.logprobs(linear_adapter=adapter, options=WIDE(7))
        assert errors(found, -array(expected))[1] < 4e-6


@pytest.mark.parametrize("way", WAYS)
def test_lazy_logits(way):
    """A head passes its options, so that `float()` after it loses nothing."""
    case = problem(24, 32, 101, dtype=torch.bfloat16)
    head = LMHead(32, 101, bias=False, dtype=torch.bfloat16, options=WIDE(5, gradients=way))
    head.weight = torch.nn.Parameter(case.head.detach().clone())
    value = F.cross_entropy(head(case.hidden).float(), case.target)
    expected = case.loss(options=WIDE(5, gradients=way))
    assert torch.equal(value, expected)
    found = torch.autograd.grad(value, (case.hidden, head.weight))
    for one, other in zip(found, gradients(expected, case), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_wide_factors_stay_as_they_were(way, dtype):
    case = problem(24, 32, 101, dtype=dtype, bias=True)
    value, same = (case.loss(options=options(5, gradients=way)) for options in (WIDE, ChunkOptions))
    assert torch.equal(value, same)
    for one, other in zip(gradients(value, case), gradients(same, case), strict=True):
        assert torch.equal(one, other)


def test_logits_that_exist_are_as_precise_as_they_are():
    logits, target = torch.randn(9, 33).bfloat16(), torch.randint(33, (9,))
    assert torch.equal(cross_entropy(logits, target, options=WIDE()), cross_entropy(logits, target))


# --- sharded ---


def sharded(rank, size, case, stops, options):
    starts = [0, *stops[:-1]]
    vocab = VocabShard(torch.distributed.group.WORLD, starts[rank], stops[rank], stops[-1])
    hidden = case.hidden.detach().clone().requires_grad_()
    head = case.head.detach()[starts[rank] : stops[rank]].clone().requires_grad_()
    value = linear_cross_entropy(hidden, head, case.target, vocab=vocab, options=options, reduction="sum")
    value.backward()
    logprobs = linear_logprobs(hidden.detach(), head.detach(), case.target, vocab=vocab, options=WIDE(7))
    return value.detach(), logprobs, hidden.grad, head.grad


@pytest.mark.parametrize("stops", [(101, 301), (40, 40, 301)], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_shards(dtype, way, stops):
    case = problem(60, 64, 301, dtype=dtype, spread=3.0)
    exact = of_targets(case, dense(case, torch.float64))
    (_, of_plain), (_, of_expected) = plain_and_expected(case, reduction="sum")
    ranks = run_threads(sharded, len(stops), case, stops, WIDE(7, gradients=way))
    for value, logprobs, of_hidden, _ in ranks:
        torch.testing.assert_close(value.double(), -exact.sum(), rtol=1e-6, atol=0)
        assert_no_worse(logprobs, of_targets(case, dense(case, torch.float32)), array(exact))
        assert_gradients_no_worse([of_hidden], of_plain[:1], of_expected[:1], "backward", dtype)
    whole = torch.cat([of_head for *_, of_head in ranks])
    assert_no_worse(whole, of_plain[1], of_expected[1], "head", dtype if way == "forward" else None)


# --- the other ways to compute ---


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_filter(way):
    case = problem(96, 64, 501, dtype=torch.bfloat16, spread=6.0)
    exact, filtered = (
        gradients(case.loss(options=WIDE(40, gradients=way, gradient_filter=threshold)), case)
        for threshold in (None, 1e-4)
    )
    for one, other in zip(exact, filtered, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.02 * one.norm()


def test_a_compiled_loss():
    case = problem(24, 32, 101, dtype=torch.bfloat16)
    step = torch.compile(lambda: case.loss(options=WIDE(5)), fullgraph=True, backend="aot_eager")
    value, expected = step(), case.loss(options=WIDE(5))
    assert torch.equal(value, expected)
    for one, other in zip(gradients(value, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-6)


def test_transforms_and_second_derivatives():
    """Both go through plain code, which forms fp32 logits too."""
    case = problem(24, 32, 101, dtype=torch.bfloat16)
    arguments = case.head.detach(), case.target
    found = torch.func.vmap(lambda h, y: linear_logprobs(h, arguments[0], y, options=WIDE()))(case.hidden, case.target)
    exact = array(of_targets(case, dense(case, torch.float64)))
    assert errors(found, exact)[1] < 2e-6
    value = case.loss(options=WIDE(gradients="backward"))
    (first,) = torch.autograd.grad(value, case.hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), case.hidden)
    assert second.isfinite().all() and second.count_nonzero()


def test_the_gradient_of_frozen_parts_costs_nothing():
    case = problem(64, 32, 1024, dtype=torch.bfloat16, ignored=0.0)
    case.head.requires_grad_(False)
    assert work(train(case, options=WIDE(16))).multiplications == 2 * 64 * 32 * 1024


# --- memory ---


@pytest.mark.parametrize("way", WAYS)
def test_no_wide_copy_of_the_head(way):
    """Neither the head nor the logits exist in fp32 as a whole: the head's fp32 sum is the largest tensor."""
    case = problem(64, 64, 65536, dtype=torch.bfloat16, ignored=0.0)
    options = WIDE(chunk_size=2, gradients=way)
    cost = work(train(case, options=options))
    assert cost.largest <= 65536 * 64 * (4 if way == "forward" else 2)
    with torch.no_grad():
        cost = work(lambda: case.loss(options=options))
    assert cost.largest <= 2048 * 64 * 4
    law = predict_memory(64, 65536, 64, dtype=torch.bfloat16, options=options)
    most = law.peak - law.peak_terms["packed"]
    assert work(train(case, options=options)).peak <= 1.1 * most


def test_the_budget_holds_logits_and_their_gradients():
    size = 6 * 1000 * 100  # 100 tokens of fp32 logits and bf16 gradients
    settings = Settings.of(WIDE(memory_budget=size), torch.bfloat16, "cpu")
    assert Plan.by_tokens(10_000, 10_000, 1000, 8, settings, head_dtype=None).tokens == 100
    two = Plan.by_tokens(10_000, 10_000, 1000, 8, settings, head_dtype=None, in_flight=2).tokens
    assert 58 <= two <= size / (10 * 1000)  # of two chunks' logits, and one chunk's gradients
    entries = Plan.by_vocabulary(1000, 1000, settings, torch.bfloat16).entries
    assert entries <= math.ceil(size / 6 / 1000 / 16) * 16 + 16


# --- errors ---


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.float16, torch.float64, "float32", 32, True], ids=str)
def test_other_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"logits_dtype must be None or torch\.float32, was "):
        ChunkOptions(logits_dtype=wrong)
