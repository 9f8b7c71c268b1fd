"""On a CUDA device: the kernels' own tests, accuracy, no synchronisation, CUDA graphs, compilation, determinism."""

import contextlib
import dataclasses
import warnings

import pytest
import torch

from chunked_ce import ChunkOptions, TokenMean, cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce import devices as products
from chunked_ce.rows import backend as kernels
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
from tests.precision import assert_no_worse, plain_and_expected

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or kernels.INTERPRETED, reason="needs a CUDA device, and Triton not interpreted"
)
if torch.cuda.is_available() and not kernels.INTERPRETED and kernels.triton_runs(torch.device("cuda"), torch.float32):
    from tests.engine.filter_cases import *  # noqa: F403
    from tests.engine.kernel_cases import *  # noqa: F403  every kernel against its torch twin

LOW = (torch.bfloat16, torch.float16)
BACKENDS = ("torch", "triton")


def everything(vocab, tokens):
    weights = {"weight": torch.linspace(0.5, 2.0, vocab), "token_weight": torch.linspace(0.1, 1.0, tokens)}
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5}
    return terms | {name: values.cuda() for name, values in weights.items()}


def on_gpu(case):
    moved = {name: value.detach().cuda() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    return case.fresh(**{k: v.requires_grad_() if v.is_floating_point() else v for k, v in moved.items()})


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, backend):
    options = chunks(5, way, backend=backend)
    for terms in ({}, everything(11, 24)):
        check_loss(on_gpu(problem(24, 6, 11, bias=True)), reduction=reduction, options=options, **terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_and_existing_logits(backend):
    options = ChunkOptions(backend=backend)
    check_logprobs(on_gpu(problem(24, 6, 11)), options=options, entropy=True, softcap=3.0)
    scores = (3 * torch.randn(24, 11)).cuda().requires_grad_()
    target = torch.randint(11, (24,))
    target[3] = -100
    check_cross_entropy(scores, target.cuda(), options=options, **everything(11, 24))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_narrow_dtypes(dtype, way):
    """No worse than the plain loss in this dtype, over many chunks too: sums in fp32 come from the products."""
    case = on_gpu(problem(512, 64, 1000, dtype=dtype))
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
    for size in (512, 40):
        value = case.loss(options=chunks(size, way))
        assert_no_worse(value, plain, expected)
        for name, got, other, right in zip(
            ("input", "linear_weight"), gradients(value, case), plain_gradients, expected_gradients, strict=False
        ):
            assert_no_worse(got, other, right, f"gradient of {name}")


def test_a_sum_in_the_product():
    """fp32 sums of bf16 products, exact where a bf16 rounding of a part would not be."""
    left = torch.full((32, 24), 1.0, dtype=torch.bfloat16, device="cuda")
    right = torch.full((24, 48), 1.0 + 2**-7, dtype=torch.bfloat16, device="cuda")
    total = torch.full((32, 48), torch.nan, device="cuda")
    assert products.adds_in_product("cuda", total.dtype, left.dtype)
    with no_waiting():
        products.add_product_(total, left, right, first=True)
        for _ in range(2):
            products.add_product_(total, left, right, first=False)
    assert (total == 3 * 24 * (1 + 2**-7)).all()


@pytest.mark.parametrize("known", ["masked", "on the host", "counted by a mean", "none is ignored"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_no_waiting(reduction, way, backend, known):
    """peers 13: a step, every option in, never waits for the device, if the host knows the ignored tokens."""
    case, terms = on_gpu(problem(24, 6, 11, bias=True)), everything(11, 24)
    number = torch.tensor(7.0, device="cuda")
    if known == "on the host":
        case = dataclasses.replace(case, target=case.target.cpu())
    if known == "none is ignored":
        case = dataclasses.replace(case, target=case.target.clamp(min=0))
    ignored = {"backend": backend, "ignored": "mask" if known == "masked" else "auto"}

    def step():
        if known in ("counted by a mean", "none is ignored"):
            TokenMean.over(case.target)
        value, _ = case.loss(
            reduction=reduction, options=chunks(5, way, **ignored), num_tokens=number, return_stats=True, **terms
        )
        value.sum().backward()
        case.loss(reduction=reduction, options=chunks(5, way, **ignored), num_tokens=7).sum().backward()
        linear_logprobs(case.hidden, case.head, case.target, options=ChunkOptions(**ignored)).sum().backward()

    step()  # compiles the kernels
    with no_waiting():
        step()


@pytest.mark.parametrize("way", WAYS)
def test_the_one_wait(way):
    """Where nobody knows which tokens count, the host waits once, in the forward."""
    case = on_gpu(problem(24, 6, 11))

    def waits(function):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                result = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return result, sum("synchroniz" in str(each.message) for each in seen)

    gradients(case.loss(options=chunks(5, way)), case)  # compiles the kernels
    value, forward = waits(lambda: case.loss(options=chunks(5, way)))
    found, backward = waits(lambda: gradients(value, case))
    assert (forward, backward) == (1, 0)
    masked = case.loss(options=chunks(5, way, ignored="mask"))
    torch.testing.assert_close((value, *found), (masked, *gradients(masked, case)))


def test_no_waiting_of_existing_logits():
    scores = torch.randn(24, 11, device="cuda", requires_grad=True)
    target = torch.randint(11, (24,), device="cuda")
    cross_entropy(scores, target).backward()
    with no_waiting():
        cross_entropy(scores, target).backward()


@pytest.mark.parametrize("way", WAYS)
def test_cuda_graph(way):
    """A captured step replayed on other inputs."""
    case = on_gpu(problem(24, 6, 11))
    other = on_gpu(problem(24, 6, 11, seed=1))

    def step():
        value = case.loss(options=chunks(5, way))
        return value, *gradients(value, case)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name in ("hidden", "head", "target"):
            getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    value = other.loss(options=chunks(5, way, ignored="mask"))
    assert_equal(captured, [value, *gradients(value, other)])


@pytest.mark.parametrize("way", WAYS)
def test_compile(way):
    case = on_gpu(problem(24, 6, 11))
    step = torch.compile(lambda h, w, y: linear_cross_entropy(h, w, y, options=chunks(5, way)), fullgraph=True)
    value, expected = step(case.hidden, case.head, case.target), case.loss(options=chunks(5, way))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, case), gradients(expected, case))


@pytest.mark.parametrize("way", WAYS)
def test_twice_the_same(way):
    case = on_gpu(problem(512, 64, 5000, dtype=torch.bfloat16))
    first, second = (
        (value, *gradients(value, case)) for value in (case.loss(options=chunks(100, way)) for _ in range(2))
    )
    assert_equal(first, second)


def test_more_than_31_bits():
    """Logits of over 2^31 elements, whose rows have known losses."""
    rows, vocab = 16_400, 131_072
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    scores = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    target = torch.arange(rows, device="cuda")
    scores[torch.arange(rows, device="cuda"), target] = 12.0
    scores.requires_grad_()
    assert scores.numel() > 2**31
    value = cross_entropy(scores, target, reduction="none")
    expected = torch.log(torch.tensor(12.0, dtype=torch.float64).exp() + vocab - 1) - 12
    assert_close(value, array(expected.expand(rows)), 13.0, torch.float32)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    for row in (0, rows - 1):
        assert_close(gradient[row, row], array(torch.expm1(-expected)), 1.0, torch.bfloat16)
        assert gradient[row].count_nonzero() == vocab


def test_upstream_of_one_reads_nothing():
    """A gradient of one returns the saved gradient itself; another scales it."""
    case = on_gpu(problem(24, 6, 11))
    one, three = (gradients(factor * case.loss(reduction="sum"), case) for factor in (1, 3))
    torch.testing.assert_close(three, [3 * grad for grad in one])
