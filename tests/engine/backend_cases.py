"""The public functions with ``backend="triton"``, run by `test_triton_rows.py` in the interpreter.

The bound is the reference's, as for every other way to compute.
"""

import dataclasses
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist

from chunked_ce import ChunkOptions, VocabShard, cross_entropy, linear_loss
from chunked_ce.rows import triton_rows
from tests.cases import (
    REDUCTIONS_AND_WAYS,
    WAYS,
    array,
    assert_close,
    assert_equal,
    check_cross_entropy,
    check_logprobs,
    check_loss,
    chunks,
    gradients,
    problem,
)
from tests.engine.interpreter import round_as_devices_do
from tests.objectives.users_own import OBJECTIVES, expected, per_token
from tests.precision import assert_gradients_no_worse, assert_no_worse, plain_and_expected

round_as_devices_do()

N = 9  # tokens: chunks of four and one that is not full
TERMS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5},
    {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 2.0, 11), "token_weight": torch.linspace(0.1, 1.0, N)},
)


@pytest.fixture(params=["drop", pytest.param("mask", marks=pytest.mark.thorough)])
def ignored(request):
    """What becomes of ignored tokens."""
    return request.param


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Fails a test in which no kernel ran."""
    seen = set()

    def spy(kernel, *args, **keywords):
        seen.add(kernel.__name__)
        return kernel(*args, **keywords)

    for name in ("_part", "logit_gradients"):
        monkeypatch.setattr(triton_rows, name, functools.partial(spy, getattr(triton_rows, name)))
    yield
    assert seen == {"_part", "logit_gradients"}


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms) or "plain")
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, terms, ignored):
    case = problem(N, 5, 11, bias=True)
    check_loss(case, reduction=reduction, options=chunks(4, way, backend="triton", ignored=ignored), **terms)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("way", WAYS)
def test_objectives_that_a_user_writes(name, way, ignored):
    case = problem(N, 5, 11, bias=True)
    options = chunks(4, way, backend="triton", ignored=ignored)
    arguments = OBJECTIVES[name], case.hidden, case.head, case.target
    value = linear_loss(*arguments, linear_bias=case.bias, options=options, **per_token(name, N))
    want, expected_gradients = expected(name, case)
    torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=2e-6)
    for ours, right in zip(torch.autograd.grad(value, case.leaves()), expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=2e-6)


def test_linear_logprobs(ignored):
    check_logprobs(problem(N, 5, 11), options=chunks(4, backend="triton", ignored=ignored), entropy=True, softcap=3.0)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(reduction, terms, ignored):
    logits = (3 * torch.randn(N, 11)).requires_grad_()
    target = torch.randint(11, (N,))
    target[3] = -100
    check_cross_entropy(
        logits, target, reduction=reduction, options=ChunkOptions(backend="triton", ignored=ignored), **terms
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_narrow_dtypes(way, dtype):
    case = problem(24, 16, 300, dtype=dtype)
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
    value = case.loss(options=chunks(24, way, backend="triton"))
    assert_no_worse(value, plain, expected)
    got = gradients(value, case, torch.ones_like(value))
    assert_gradients_no_worse(got, plain_gradients, expected_gradients, way, dtype)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_wide_logits(way, dtype, softcap, ignored):
    """The kernels read fp32 products and write narrow gradients to other memory."""
    case = problem(14, 16, 300, dtype=dtype, spread=3.0)
    options = chunks(6, way, backend="triton", ignored=ignored, logits_dtype=torch.float32)
    value = case.loss(options=options, softcap=softcap)
    exact = case.rows(softcap=softcap)
    assert abs(value.item() - exact.reduce("mean")[0]) <= 2e-6 * abs(exact.reduce("mean")[0])
    torch_way = dataclasses.replace(options, backend="torch")
    found, expected = gradients(value, case), gradients(case.loss(options=torch_way, softcap=softcap), case)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= 2 * torch.finfo(dtype).eps * other.norm()
    filtered = dataclasses.replace(options, gradient_filter=1e-3)
    for one, other in zip(gradients(case.loss(options=filtered, softcap=softcap), case), expected, strict=True):
        assert (one - other).norm() <= 0.1 * other.norm()


def test_stats():
    case = problem(N, 5, 11)
    found, expected = (
        case.loss(options=chunks(4, backend=backend), return_stats=True) for backend in ("triton", "torch")
    )
    found[0].backward()
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("ignored", ["drop", "mask"])
@pytest.mark.parametrize("way", WAYS)
def test_gradient_filter(way, ignored):
    """The column sums of the kernel choose as those of the torch kernels do."""
    case = problem(14, 16, 300, spread=6.0)
    found, expected = (
        gradients(case.loss(options=chunks(6, way, backend=backend, ignored=ignored, gradient_filter=1e-3)), case)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found, expected)
    exact = gradients(case.loss(options=chunks(6, way, backend="triton", ignored=ignored)), case)
    assert not torch.allclose(found[1], exact[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignored", ["drop", "mask"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_in_ignored_tokens(garbage, ignored):
    """Nothing of a token that does not count reaches a value or a gradient, kept or dropped."""
    case = problem(N, 5, 11)
    lost = case.target == -100
    assert lost.any()
    for way in WAYS:
        clean = case.fresh()
        expected = gradients(clean.loss(options=chunks(4, way, backend="triton", ignored=ignored)), clean)
        dirty = case.fresh()
        with torch.no_grad():
            dirty.hidden[lost] = garbage
        assert_equal(gradients(dirty.loss(options=chunks(4, way, backend="triton", ignored=ignored)), dirty), expected)
    logits = torch.randn(N, 11)
    logits[lost] = garbage
    logits.requires_grad_()
    value = cross_entropy(logits, case.target, options=ChunkOptions(backend="triton", ignored=ignored))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all() and gradient[lost].count_nonzero() == 0


def test_upstream_gradients():
    """A gradient of one leaves the saved gradient where it is; another one scales it."""
    case = problem(N, 5, 11)
    one = gradients(case.loss(options=chunks(4, backend="triton")), case)
    three = gradients(3 * case.loss(options=chunks(4, backend="triton")), case)
    torch.testing.assert_close(three, [3 * grad for grad in one])


@pytest.mark.parametrize("way", WAYS)
def test_shard_of_one_rank(way, ignored):
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
        try:
            vocab = VocabShard(dist.group.WORLD, 0, 11, 11)
            terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
            case = problem(N, 5, 11)
            value, stats = case.loss(
                options=chunks(4, way, backend="triton", ignored=ignored), vocab=vocab, return_stats=True, **terms
            )
            reference = case.rows(**terms)
            assert_close(value, *reference.reduce("mean"), torch.float32)
            assert stats.num_correct == (reference.hit & reference.counted).sum()
            coefficient = reference.coefficient("mean")
            expected = reference.gradients("loss", array(case.hidden), array(case.head), coefficient)
            for grad, (right, scale) in zip(gradients(value, case), expected, strict=False):
                assert_close(grad, right, scale, torch.float32, "gradient")
        finally:
            dist.destroy_process_group()
